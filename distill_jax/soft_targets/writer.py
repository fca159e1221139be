"""Writes stores of soft targets: in one pass over the teacher, by any number of processes, resumed."""

import functools
import hashlib
import json
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from distill_jax import files, processes
from distill_jax.errors import UserError
from distill_jax.soft_targets import identity, reduction, shard_files
from distill_jax.soft_targets.encodings import Encoding
from distill_jax.soft_targets.ensemble import Mean
from distill_jax.soft_targets.reduction import Meta, Teacher


def write(
    folder: str | os.PathLike[str],
    source: ArrayLike | Sequence[ArrayLike] | Teacher,
    digests: ArrayLike,
    *,
    teacher: str,
    data: Mapping[str, str] | None = None,
    encoding: Encoding = "dense",
    k: int | None = None,
    temperatures: float | Sequence[float] | None = None,
    mean: Mean | None = None,
    probabilities: bool = False,
    ids: ArrayLike | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    shard_rows: int = 65536,
    batch_size: int = 1024,
    shards: Sequence[int] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a store, or what an interrupted call left to do.

    The processes of a run all call it, share the shards out, and leave it together. A kill at any
    moment loses at most the shard that is being written. Independent jobs each write some `shards`; a
    call without them, or `finish`, then makes a store of all.

    "dense" logits v `[N, C]`, with `softmax(v / T)` the soft targets, serve every temperature if they
    are one teacher's, or the mean of the members' logits (a geometric mean of their distributions). An
    arithmetic mean, and the other encodings, are good at the given temperatures alone.

    A folder that holds the same store, or a part of it, is resumed; one that holds another is an
    error, or replaced. What is compared: the arguments, the digests, and the logits themselves where
    they are arrays. Of a function nothing but the teacher's fingerprint is known: change it with the
    teacher. (To ask it again and compare would refuse another device's rounding.)

    Args:
        folder: for the store, and nothing else.
        source: logits, row i of example i: an array or memmap `[N, C]` of any program; a list of them,
            of an ensemble's members; or a function of rows int64 `[B]` that returns `[B, C]`, or
            `[M, B, C]` of members. It is called with as many rows each time, so that one compiled
            program serves; what it returns on the device is reduced there. In a run of several
            processes each calls its own: it must not be a program that they have to run together.
        digests: uint64 `[N]`, of the inputs that the teacher saw (`soft_targets.digests`).
        teacher: the teacher's fingerprint.
        data: what identifies the inputs and their order, such as {"alignment": "ab12..."}.
        encoding: "dense", "top_k" or "sampled" (see `encodings`).
        k: of "top_k", probabilities kept of each example; of "sampled", classes drawn.
        temperatures: one or several that the targets are made at.
        mean: "arithmetic" or "geometric", of an ensemble; None for one teacher.
        probabilities: the source returns probabilities `[B, C]`, at the one temperature given.
        ids: int64 `[N]` of the examples, distinct; None: 0..N-1.
        num_classes: C, of a function.
        seed: of the draws, each a function of the seed, the example's id and its soft targets alone.
        shard_rows: examples of a shard.
        batch_size: examples that the source is asked for at a time.
        shards: numbers of those to write, of a store that is finished later; None: all, and finish.
        overwrite: replaces another store in the folder, in one step once the new one is finished: a kill
            at any moment leaves the old one or the new one.
        progress: called after every shard with the examples that this call has written, and those that
            it has to write.

    Raises:
        UserError: if the folder holds another store, naming both sides, or other files; for arguments
            that don't fit together, ids that repeat or are no whole numbers, another number of rows or
            classes, logits that are not finite, and rows that are not probabilities; or as `finish`.

    Examples:
        >>> import tempfile
        >>> from distill_jax import soft_targets
        >>> inputs = np.arange(6.0).reshape(3, 2)
        >>> logits = np.log([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75]])
        >>> folder, digests = tempfile.mkdtemp(), soft_targets.digests(inputs)
        >>> how = {"encoding": "top_k", "k": 1, "temperatures": [1.0, 2.0]}
        >>> write(folder, logits, digests, teacher="my teacher", **how)
        >>> store = soft_targets.load(folder, teacher="my teacher", num_classes=3)
        >>> some = {"id": np.array([2, 0]), "inputs": inputs[[2, 0]]}
        >>> examples = soft_targets.attach(some, store, 1.0)
        >>> print(examples["teacher_ids"].ravel(), examples["teacher_probabilities"].ravel())
        [2 0] [0.75 0.5]
    """
    folder, digests = files.local_path(folder), identity.as_digests(digests)
    ask, num_classes = _teacher(source, len(digests), mean, num_classes)
    ids = _own_ids(ids, len(digests))
    fields = {
        "encoding": encoding,
        "k": k if k is None else _number("k", k),
        "seed": _number("seed", seed) if encoding == "sampled" else None,
        "num_classes": _number("num_classes", num_classes),
        "temperatures": temperatures if temperatures is None else _as_floats(temperatures),
        "mean": mean,
        "probabilities": probabilities,
        "teacher": teacher,
        "data": _plain(data or {}),
        "num_examples": len(digests),
        "ids": None if ids is None else hashlib.sha256(ids.tobytes()).hexdigest()[:16],
        "shard_rows": _number("shard_rows", shard_rows, 1),
    }
    meta: Meta = files.versioned(shard_files.FORMAT, fields)
    reduction.check(meta)
    logits = None if callable(source) else functools.partial(_digest, ask)
    files.check_writable(folder, "folder")
    shard_files.check_folder(folder)
    place = folder
    if processes.agree(overwrite and _is_other(folder, meta, digests, logits)):
        if shards is not None:
            raise UserError(f"overwrite replaces {folder} as a whole: leave shards out")
        place = _beside(folder, meta, digests, logits)
    shard_files.check_started(place, meta, digests, logits)
    wanted = _dealt(shards, shard_files.count(meta))
    left = [number for number in wanted if not shard_files.folder(place, number).exists()]
    size, done = sum(len(shard_files.rows(meta, number)) for number in left), 0
    batch_size = min(_number("batch_size", batch_size, 1), shard_rows, len(digests))
    for number in left:
        rows = shard_files.rows(meta, number)
        if not shard_files.folder(place, number).exists():  # another writer may be at work
            arrays = reduction.encode(ask, rows, ids, batch_size=batch_size, meta=meta)
            arrays["digests"] = digests[rows.start : rows.stop]
            if ids is not None:
                arrays["ids"] = ids[rows.start : rows.stop]
            shard_files.write(place, number, arrays, meta, logits(rows) if logits else None)
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
        ...     write(folder, logits, digests, teacher="t", shard_rows=2, shards=[shard])
        >>> finish(folder, digests)
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


def _teacher(
    source: Any, size: int, mean: Mean | None, num_classes: int | None
) -> tuple[Teacher, int]:
    """What is asked for rows, and C."""
    if callable(source):
        if num_classes is None:
            raise UserError("the teacher is a function: give num_classes too")
        return source, num_classes
    single = hasattr(source, "shape")  # an array of NumPy, JAX or PyTorch
    if not single and not isinstance(source, list | tuple):
        raise UserError(
            f"logits are of type {type(source).__name__}; expected arrays or a function"
        )
    members = [np.asarray(logits) for logits in ([source] if single else source)]
    kinds = {str(member.dtype) for member in members if not _is_real(member.dtype)}
    if kinds:
        raise UserError(f"logits are of {', '.join(sorted(kinds))}; expected real numbers")
    shapes = {member.shape for member in members}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 2 or shape[0] != size:
        raise UserError(
            f"logits are {', '.join(map(str, sorted(shapes))) or 'none'} for {size} digests; "
            f"expected arrays ({size}, C), one of each teacher"
        )
    if num_classes not in (None, shape[1]):
        raise UserError(f"num_classes is {num_classes}, but the logits have {shape[1]}")
    if (mean is None) != (len(members) == 1):
        raise UserError(
            f"mean is {mean!r} for {len(members)} arrays of logits; expected 'arithmetic' or "
            "'geometric' for an ensemble, and None for one teacher"
        )

    def ask(rows: np.ndarray) -> np.ndarray:
        some = np.stack([member[rows] for member in members]).astype(np.float32)
        return some[0] if mean is None else some

    return ask, shape[1]


def _is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _digest(ask: Teacher, rows: range) -> str:
    """Names the logits of some rows."""
    digest = hashlib.sha256()
    for first in range(rows.start, rows.stop, 1024):  # as many as fit in the memory
        part = np.asarray(ask(np.arange(first, min(first + 1024, rows.stop))))
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _own_ids(ids: ArrayLike | None, size: int) -> np.ndarray | None:
    """Ids int64 `[N]`; None if they are the rows, which need not be stored."""
    if ids is None:
        return None
    ids = identity.as_ids(ids)
    if ids.shape != (size,):
        raise UserError(f"ids are {ids.shape} for {size} digests; expected ({size},)")
    if len(np.unique(ids)) != size:
        raise UserError("soft targets need examples with distinct ids")
    return None if np.array_equal(ids, np.arange(size)) else ids


def _number(name: str, value: Any, least: int = 0) -> int:
    """A whole number of Python, of one of any library."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise UserError(f"{name} is {value!r}; expected a whole number") from error
    if number < least:
        raise UserError(f"{name} is {number}; expected at least {least}")
    return number


def _as_floats(temperatures: ArrayLike) -> list[float]:
    try:
        return sorted(np.ravel(np.asarray(temperatures, np.float64)).tolist())
    except (TypeError, ValueError) as error:
        raise UserError(f"temperatures are {temperatures!r}; expected numbers") from error


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
