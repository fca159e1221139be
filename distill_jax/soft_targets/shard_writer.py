"""Writes the shards of a store that are left to do, by any number of processes, and finishes it."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from distill_jax import files, processes
from distill_jax.errors import UserError
from distill_jax.soft_targets import identity, shard_files, sources
from distill_jax.soft_targets.reduction import Meta


def make_meta(
    fields: Mapping[str, Any],
    digests: np.ndarray,
    ids: np.ndarray | None,
    *,
    teacher: str,
    data: Mapping[str, str] | None,
    shard_rows: int,
) -> Meta:
    """How a store is made: fields of its own, and those that all have; arguments as for `write`."""
    names = None if ids is None else hashlib.sha256(ids.tobytes()).hexdigest()[:16]
    common = {
        "teacher": teacher,
        "data": _plain(data or {}),
        "num_examples": len(digests),
        "ids": names,
        "shard_rows": sources.number("shard_rows", shard_rows, 1),
    }
    return files.versioned(shard_files.FORMAT, {**fields, **common})


def write_shards(
    folder: str | os.PathLike[str],
    meta: Meta,
    digests: np.ndarray,
    ids: np.ndarray | None,
    *,
    encode: Callable[[range], dict[str, np.ndarray]],
    made_of: shard_files.Digest | None,
    shards: Sequence[int] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the shards of a store that are left to do, and finishes it; see `write`.

    Args:
        folder: for the store.
        meta: of `make_meta`.
        digests: uint64 `[N]`.
        ids: int64 `[N]`; None: the rows.
        encode: rows -> the arrays that the encoding stores of them.
        made_of: names what some rows are made of; None: that isn't known.
        shards, overwrite, progress: as for `write`.
    """
    folder = files.local_path(folder)
    files.check_writable(folder, "folder")
    shard_files.check_folder(folder)
    place = folder
    if processes.agree(overwrite and _is_other(folder, meta, digests, made_of)):
        if shards is not None:
            raise UserError(f"overwrite replaces {folder} as a whole: leave shards out")
        place = _beside(folder, meta, digests, made_of)
    shard_files.check_started(place, meta, digests, made_of)
    wanted = _dealt(shards, shard_files.count(meta))
    left = [number for number in wanted if not shard_files.folder(place, number).exists()]
    size, done = sum(len(shard_files.rows(meta, number)) for number in left), 0
    for number in left:
        rows = shard_files.rows(meta, number)
        if not shard_files.folder(place, number).exists():  # another writer may be at work
            arrays = encode(rows)
            arrays["digests"] = digests[rows.start : rows.stop]
            if ids is not None:
                arrays["ids"] = ids[rows.start : rows.stop]
            shard_files.write(place, number, arrays, meta, made_of(rows) if made_of else None)
        done += len(rows)
        if progress is not None:
            progress(done, size)
    processes.wait()
    if shards is None:
        finish(place, digests)
    if place != folder:
        _replace(folder, place)


@processes.main_only
def finish(folder: str | os.PathLike[str], digests: ArrayLike) -> None:
    """Checks that all shards are there, whole and of these inputs, and writes the store's index.

    All processes of a run call it, and process 0 does the work.

    Args:
        folder: of the store.
        digests: uint64 `[N]`, of all examples' inputs.

    Raises:
        UserError: for a shard that is missing, damaged, of another store or of other inputs.

    Examples:
        Two jobs write a shard each, and either of them finishes the store.

        >>> import tempfile
        >>> from distill_jax import soft_targets
        >>> logits, digests, folder = np.zeros((4, 3)), np.arange(4, dtype=np.uint64), tempfile.mkdtemp()
        >>> for shard in (0, 1):
        ...     soft_targets.write(folder, logits, digests, teacher="t", shard_rows=2, shards=[shard])
        >>> soft_targets.finish(folder, digests)
        >>> len(soft_targets.load(folder).shards)
        2
    """
    shard_files.finish(files.local_path(folder), identity.as_digests(digests))


def _is_other(
    folder: Path, meta: Meta, digests: np.ndarray, logits: shard_files.Digest | None
) -> bool:
    """Whether the folder holds another store than this, or a damaged one."""
    try:
        shard_files.check_started(folder, meta, digests, logits)
    except UserError:
        return True
    return False


def _beside(
    folder: Path, meta: Meta, digests: np.ndarray, logits: shard_files.Digest | None
) -> Path:
    """Where a store is written that will replace another: the same place for the same store."""
    found = logits(range(len(digests))) if logits is not None else ""
    name = hashlib.sha256(f"{sorted(meta.items())}{found}".encode() + digests.tobytes())
    return folder.with_name(f"{folder.name}.{name.hexdigest()[:8]}.partial")


@processes.main_only
def _replace(folder: Path, new: Path) -> None:
    files.exchange(new, folder)
    files.remove(new)


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """As it is read back."""
    try:
        return json.loads(json.dumps(dict(data)))
    except (TypeError, ValueError) as error:
        raise UserError(f"data is {data!r}; expected words by name ({error})") from error


def _dealt(shards: Sequence[int] | None, count: int) -> Sequence[int]:
    """Those that this process of a run writes, of some or all of a store's shards."""
    shards = range(count) if shards is None else shards
    wrong = [number for number in shards if not 0 <= number < count]
    if wrong:
        raise UserError(f"no shard {wrong[0]}; the store has {count}, numbered from 0")
    index = 0 if processes.count() == 1 else jax.process_index()
    return shards[index :: processes.count()]
