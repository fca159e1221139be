"""The files of a compressed store of soft targets, which any number of writers may share out.

    shards/00000/*.npy       arrays of the first `shard_rows` examples, and the sum of their targets
    shards/00000/shard.json  what the store is of, and the SHA-256 of the shard's arrays
    tail_weights.npy         the mean distribution of all examples
    meta.json                the index: what the store is of, and all hashes; written last

No two shards share a file, and a shard appears whole or not at all: a kill at any moment loses at most
those that are being written. Two writers of one shard write under names of their own, and the first
that is done counts.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.errors import UserError

FORMAT, VERSION = "distill_jax.compressed_targets", 2
WEIGHTS = "tail_weights.npy"
_INDEX, _NOTE = "meta.json", "shard.json"
_AGAIN = "remove {} and give the command that wrote it again"
# What was to be renamed was removed, or a folder is there already.
_ANOTHER_WAS_FIRST = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)

Meta = dict[str, Any]
"""What a store is of. Read here: "format", "version", "num_examples" and "shard_rows"."""


def count(meta: Meta) -> int:
    """How many shards a store has."""
    return -(-meta["num_examples"] // meta["shard_rows"])


def examples(meta: Meta, number: int) -> range:
    """The examples of a shard."""
    start = number * meta["shard_rows"]
    return range(start, min(start + meta["shard_rows"], meta["num_examples"]))


def folder(directory: Path, number: int) -> Path:
    """Where a shard is."""
    return directory / "shards" / f"{number:05d}"


def write(directory: Path, number: int, arrays: Mapping[str, np.ndarray], meta: Meta) -> None:
    """Writes a shard and its hash; one that is there stays as it is.

    Args:
        directory: of the store.
        number: of the shard.
        arrays: by name; among them "digests" uint64 `[n]` of the inputs, and "sum" float64 `[C]`.
        meta: of the store.
    """
    with _whole(folder(directory, number)) as partial:
        partial.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        _write_json(partial / _NOTE, {**meta, "sha256": _sha256(partial)})


def check_started(directory: Path, meta: Meta) -> None:
    """Raises a UserError, naming both sides, if anything that is there is of another store."""
    for path in (directory / _INDEX, *_notes(directory)):
        if path.exists():
            check_same(directory, _read(path), meta)


def finish(directory: Path, digests: np.ndarray) -> None:
    """Checks all shards and writes the index; what killed writers left is removed.

    Args:
        directory: of the store.
        digests: uint64 `[N]`, of all examples' inputs.

    Raises:
        UserError: for shards that are missing or damaged, of several stores, or of other inputs.
    """
    meta = _unfinished(directory)
    check_same(directory, meta, {"num_examples": len(digests)})
    hashes, total = {}, np.zeros(())
    for number in range(count(meta)):
        shard, rows = folder(directory, number), examples(meta, number)
        note = _read_note(shard)
        hashes[shard.name] = note.pop("sha256")
        check_same(directory, note, meta)
        _check_whole(shard, hashes)
        _check_inputs(shard, rows.start, digests[rows.start : rows.stop])
        total = total + np.load(shard / "sum.npy")
    for left in (*directory.glob("*.partial"), *directory.glob("shards/*.partial")):
        _remove(left)
    with _whole(directory / WEIGHTS) as partial, partial.open("wb") as file:
        np.save(file, (total / len(digests)).astype(np.float32))
    hashes[WEIGHTS] = _sha256(directory / WEIGHTS)
    with _whole(directory / _INDEX) as partial:
        _write_json(partial, {**meta, "sha256": hashes})


def open_finished(directory: Path, expected: Meta) -> tuple[Meta, list[Path]]:
    """What a finished store is of, and its shards' folders; all is read once, to check the hashes.

    Raises:
        UserError: for a store that is not finished, damaged, of a version that is not known, or not
            what is expected.
    """
    if not (directory / _INDEX).exists():
        meta = _unfinished(directory)
        written = sum(path.exists() for path in _shards(directory, meta))
        raise UserError(
            f"the compressed targets in {directory} are not finished, {written} of {count(meta)} "
            "shards are written: finish them with the same command"
        )
    meta = _read(directory / _INDEX)
    check_same(directory, meta, expected)
    hashes, shards = meta.pop("sha256"), _shards(directory, meta)
    for path in (*shards, directory / WEIGHTS):
        _check_whole(path, hashes)
    return meta, shards


def check_same(directory: Path, found: Meta, expected: Meta) -> None:
    """Raises a UserError with what differs of the fields that are expected."""
    differences = [
        f"{name} {found.get(name)!r}, not {value!r}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if differences:
        raise UserError(f"the compressed targets in {directory} have {'; '.join(differences)}")


def _shards(directory: Path, meta: Meta) -> list[Path]:
    return [folder(directory, number) for number in range(count(meta))]


def _notes(directory: Path) -> list[Path]:
    """Those of the shards that are there whole."""
    return sorted(p for p in directory.glob(f"shards/*/{_NOTE}") if p.parent.name.isdigit())


def _unfinished(directory: Path) -> Meta:
    """What the shards say that are there."""
    notes = _notes(directory)
    if not notes:
        raise UserError(f"no readable compressed targets in {directory}: no shards are there")
    return {name: value for name, value in _read(notes[0]).items() if name != "sha256"}


def _read(path: Path) -> Meta:
    """The index of a store, or the note of a shard."""
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        wrong = path if path.name == _INDEX else path.parent
        raise UserError(f"{path} is damaged ({error}); {_AGAIN.format(wrong)}") from error
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{path.parent} is {meta.get('format')} version {meta.get('version')}; this program reads "
            f"{FORMAT} version {VERSION}: remove the store and make it again"
        )
    return meta


def _read_note(shard: Path) -> Meta:
    if not shard.exists():
        raise UserError(f"{shard} is not written yet: other writers have to finish first")
    return _read(shard / _NOTE)


def _check_whole(path: Path, hashes: Mapping[str, str]) -> None:
    if not path.exists() or _sha256(path) != hashes.get(path.name):
        raise UserError(
            f"{path} is damaged: its SHA-256 is not the one that was noted; {_AGAIN.format('it')}"
        )


def _check_inputs(shard: Path, start: int, digests: np.ndarray) -> None:
    differs = np.load(shard / "digests.npy") != digests
    if differs.any():
        raise UserError(
            f"{differs.sum()} of {len(digests)} examples are not the inputs that {shard} was made of, "
            f"first id {start + differs.argmax()}: the data have changed; remove {shard.parent.parent}"
        )


def _sha256(path: Path) -> str:
    """Of a file, or of all arrays in a folder."""
    digest = hashlib.sha256()
    for part in sorted(path.glob("*.npy")) if path.is_dir() else [path]:
        digest.update(part.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name of this writer's own; what is written there takes the real name at the end, whole.

    If another writer was at the same and was first, or removed this one's as left over, theirs stays.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in _ANOTHER_WAS_FIRST or not path.exists():
            raise
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write_json(path: Path, content: Meta) -> None:
    path.write_text(json.dumps(content, indent=1))
