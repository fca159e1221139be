"""The files of a store of soft targets, which any number of writers may share out.

    shards/00000/*.npy        arrays of the first `shard_rows` examples, and the sums of their targets
    shards/00000/shard.json   how the store is made, and the SHA-256 of the shard's arrays
    tail_weights_T2.0.npy     the mean distribution of all examples, at each temperature
    meta.json                 the index: how the store was made, and all hashes; written last

No two shards share a file, and a shard appears whole or not at all: a kill at any moment loses at most
those that are being written. Two writers of one shard write under names of their own, and the first
to be done counts.
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

import numpy as np

from distill_jax.errors import UserError
from distill_jax.soft_targets.reduction import Meta, array_name

FORMAT, VERSION = "distill_jax.soft_targets", 2
INDEX, NOTE = "meta.json", "shard.json"
_FORMATS = (FORMAT, "distill_jax.compressed_targets")  # the second was that of older stores
_AGAIN = "delete {} and run the same command again"
# What was to be renamed was removed, or a folder is there already.
_ANOTHER_WAS_FIRST = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)


def count(meta: Meta) -> int:
    """How many shards a store has."""
    return -(-meta["num_examples"] // meta["shard_rows"])


def rows(meta: Meta, number: int) -> range:
    """The rows of a shard's examples."""
    start = number * meta["shard_rows"]
    return range(start, min(start + meta["shard_rows"], meta["num_examples"]))


def folder(store: Path, number: int) -> Path:
    """Where a shard is."""
    return store / "shards" / f"{number:05d}"


def tail_weights_file(store: Path, temperature: float) -> Path:
    """Where the mean distribution at a temperature is."""
    return store / f"{array_name('tail_weights', temperature)}.npy"


def write(store: Path, number: int, arrays: Mapping[str, np.ndarray], meta: Meta) -> None:
    """Writes a shard and its hash; one that is there stays as it is.

    Args:
        store: its folder.
        number: of the shard.
        arrays: by name; among them "digests" uint64 `[n]` of the inputs.
        meta: of the store.
    """
    with _whole(folder(store, number)) as partial:
        partial.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        _write_json(partial / NOTE, {**meta, "sha256": _sha256(partial)})


def check_started(store: Path, meta: Meta) -> None:
    """Raises a UserError if the folder holds anything but a part of this store."""
    if not store.exists():
        return
    if store.is_file():
        raise UserError(f"{store} is a file; soft targets need a folder of their own")
    for path in (store / INDEX, *_notes(store)):
        if path.exists():
            check_same(store, _read(path), meta)
    others = sorted(path.name for path in store.iterdir() if not _is_ours(path.name))
    if others:
        raise UserError(
            f"{store} holds other files ({', '.join(others[:3])}); soft targets need a folder of "
            "their own"
        )


def _is_ours(name: str) -> bool:
    return name == "shards" or name.startswith((INDEX, "tail_weights_T", "."))


def finish(store: Path, digests: np.ndarray) -> None:
    """Checks all shards and writes the index; what killed writers left is removed.

    Args:
        store: its folder.
        digests: uint64 `[N]`, of all examples' inputs.

    Raises:
        UserError: for shards that are missing or damaged, of several stores, or of other inputs.
    """
    meta = _unfinished(store)
    check_same(store, meta, {"num_examples": len(digests)})
    hashes: dict[str, str] = {}
    sums = {t: np.zeros(()) for t in meta["temperatures"] or () if meta["encoding"] != "dense"}
    for number in range(count(meta)):
        shard, here = folder(store, number), rows(meta, number)
        note = _read_note(shard)
        hashes[shard.name] = note.pop("sha256")
        check_same(store, note, meta)
        _check_whole(shard, hashes)
        _check_inputs(shard, here.start, digests[here.start : here.stop])
        for t in sums:
            sums[t] = sums[t] + np.load(shard / f"{array_name('sum', t)}.npy")
    for pattern in (f"{INDEX}.*.partial", "tail_weights_T*.partial", "shards/*.partial"):
        for left in store.glob(pattern):
            _remove(left)
    for t, total in sums.items():
        path = tail_weights_file(store, t)
        with _whole(path) as partial, partial.open("wb") as file:
            np.save(file, (total / len(digests)).astype(np.float32))
        hashes[path.name] = _sha256(path)
    with _whole(store / INDEX) as partial:
        _write_json(partial, {**meta, "sha256": hashes})


def open_finished(store: Path, expected: Meta) -> tuple[Meta, list[Path]]:
    """How a finished store was made, and its shards' folders; all is read once, to check the hashes.

    Raises:
        UserError: for a store that is not finished, damaged, of another version, or not what is
            expected.
    """
    if not (store / INDEX).exists():
        meta = _unfinished(store)
        written = sum(folder(store, number).exists() for number in range(count(meta)))
        raise UserError(
            f"the soft targets in {store} are not finished, {written} of {count(meta)} shards are "
            "written: finish them with the same command"
        )
    meta = _read(store / INDEX)
    check_same(store, meta, expected)
    hashes, shards = meta.pop("sha256"), [folder(store, n) for n in range(count(meta))]
    weights = [store / name for name in hashes if name.endswith(".npy")]
    for path in (*shards, *weights):
        _check_whole(path, hashes)
    return meta, shards


def check_same(store: Path, found: Meta, expected: Meta) -> None:
    """Raises a UserError with the expected fields that differ."""
    differences = [
        f"{name} {found.get(name)!r}, not {value!r}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if differences:
        raise UserError(f"the soft targets in {store} have {'; '.join(differences)}")


def _notes(store: Path) -> list[Path]:
    """Those of the shards that are there whole."""
    return sorted(p for p in store.glob(f"shards/*/{NOTE}") if p.parent.name.isdigit())


def _unfinished(store: Path) -> Meta:
    """The meta of the shards that are there."""
    notes = _notes(store)
    if not notes:
        raise UserError(f"no readable soft targets in {store}: no shards are there")
    return {name: value for name, value in _read(notes[0]).items() if name != "sha256"}


def _read(path: Path) -> Meta:
    """The index of a store, or the note of a shard."""
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        wrong = path if path.name == INDEX else path.parent
        raise UserError(f"{path} is damaged ({error}); {_AGAIN.format(wrong)}") from error
    found = (meta.get("format"), meta.get("version")) if isinstance(meta, dict) else (None, None)
    if found != (FORMAT, VERSION):
        store = path.parent if path.name == INDEX else path.parents[2]
        what = _AGAIN.format(store) if found[0] in _FORMATS else "it is no store of soft targets"
        raise UserError(
            f"{store} is {found[0]} version {found[1]}; this program reads {FORMAT} version "
            f"{VERSION}: {what}"
        )
    return meta


def _read_note(shard: Path) -> Meta:
    if not shard.exists():
        raise UserError(f"{shard} is not written yet: other writers have to finish first")
    return _read(shard / NOTE)


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
            f"first row {start + differs.argmax()}: the data have changed; "
            f"{_AGAIN.format(shard.parent.parent)}"
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
