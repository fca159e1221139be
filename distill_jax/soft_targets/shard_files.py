"""The files of a store of soft targets, which any number of writers may share out.

    shards/00000/*.npy        arrays of the first `shard_rows` examples, and the sums of their targets
    shards/00000/shard.json   how the store is made, the SHA-256 of the shard's arrays, and that of the
                              logits they were made of, if those were an array
    tail_weights_T2.0.npy     the mean distribution of all examples, at each temperature
    meta.json                 the index: how the store was made, and all hashes; written last

No two shards share a file, and a shard appears whole or not at all: a kill at any moment loses at most
those that are being written. Two writers of one shard write under names of their own, and the first
to be done counts.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from distill_jax import files
from distill_jax.errors import UserError
from distill_jax.soft_targets.reduction import Meta, array_name, has_tail_weights

FORMAT = ("distill_jax.soft_targets", 2)
INDEX, NOTE = "meta.json", "shard.json"
_SEAL = "note_sha256"
_FORMATS = (FORMAT[0], "distill_jax.compressed_targets")  # the second was that of older stores
_AGAIN = "delete {} and run the same command again"
_WHAT = "the store of soft targets"
_OTHERS = "name another folder, or replace it with overwrite=True"

Digest = Callable[[range], str]
"""Names the logits of some rows, as an array holds them."""


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


def write(
    store: Path, number: int, arrays: Mapping[str, np.ndarray], meta: Meta, logits: str | None
) -> None:
    """Writes a shard and its hash; one that is there stays as it is.

    Args:
        store: its folder.
        number: of the shard.
        arrays: by name; among them "digests" uint64 `[n]` of the inputs.
        meta: of the store.
        logits: the SHA-256 of those that it is made of; None: of a function's.
    """
    shard = folder(store, number)
    shard.parent.mkdir(parents=True, exist_ok=True)
    try:
        with files.write_whole(shard) as partial:
            partial.mkdir()
            for name, array in arrays.items():
                np.save(partial / f"{name}.npy", array)
            note = {**meta, "sha256": files.sha256(partial), "logits": logits}
            files.write_json(partial / NOTE, {**note, _SEAL: files.sha256_of(note)})
    except FileNotFoundError:  # another writer finished the store, and removed this partial shard
        if not shard.exists():
            raise


def check_folder(store: Path) -> None:
    """Raises a UserError if the folder holds anything but a store, finished or not."""
    for path in (store / INDEX, *_notes(store)):
        if path.exists():
            _read(path)
    files.check_own_folder(store, ["shards", INDEX, r"tail_weights_T.*\.npy"], _WHAT)
    files.check_own_folder(store / "shards", [r"\d{5,}"], _WHAT)


def check_started(store: Path, meta: Meta, digests: np.ndarray, logits: Digest | None) -> None:
    """Raises a UserError if the folder holds another store, or a part of one.

    Args:
        store: its folder.
        meta: of the store that is asked for.
        digests: uint64 `[N]`, of its inputs.
        logits: what names the logits that it is made of; None: they are a function's.
    """
    if (store / INDEX).exists():
        _check_same(store, _read(store / INDEX), meta, _OTHERS)
    for note in _notes(store):
        shard, there = note.parent, _read(note)
        _check_same(store, there, meta, _OTHERS)
        here = rows(meta, int(shard.name))
        try:
            _check_inputs(shard, here.start, digests[here.start : here.stop])
        except UserError:
            _check_whole(shard, {shard.name: str(there.get("sha256"))})
            raise
        if logits is None:
            continue
        if "logits" not in there:
            logging.warning("%s does not say of which logits it was made: not compared", shard)
        elif there["logits"] != logits(here):
            raise UserError(
                f"{store} was made of other logits than these, by a teacher of the same name "
                f"{meta['teacher']!r}: {_OTHERS}"
            )


def finish(store: Path, digests: np.ndarray) -> None:
    """Checks all shards and writes the index; what killed writers left is removed.

    Args:
        store: its folder.
        digests: uint64 `[N]`, of all examples' inputs.

    Raises:
        UserError: for shards that are missing or damaged, of several stores, or of other inputs.
    """
    meta = _unfinished(store)
    _check_same(store, meta, {"num_examples": len(digests)})
    hashes: dict[str, str] = {}
    sums = {t: np.zeros(()) for t in meta["temperatures"] or () if has_tail_weights(meta)}
    for number in range(count(meta)):
        shard, here = folder(store, number), rows(meta, number)
        note = _read_note(shard)
        hashes[shard.name], _ = note.pop("sha256"), note.pop("logits", None)
        _check_same(store, note, meta)
        _check_whole(shard, hashes)
        _check_inputs(shard, here.start, digests[here.start : here.stop])
        for t in sums:
            sums[t] = sums[t] + files.read_array(shard / f"{array_name('sum', t)}.npy")
    for own in (INDEX, "tail_weights_T*", "shards/[0-9]*"):
        for left in files.leftovers(store, own):
            files.remove(left)
    for t, total in sums.items():
        path = tail_weights_file(store, t)
        with files.write_whole(path) as partial, partial.open("wb") as file:
            np.save(file, (total / len(digests)).astype(np.float32))
        hashes[path.name] = files.sha256(path)
    hashes[INDEX] = files.sha256_of({**meta, "sha256": hashes})
    files.write_json(store / INDEX, {**meta, "sha256": hashes})


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
    hashes = dict(meta["sha256"])
    own = hashes.pop(INDEX, None)  # stores of an earlier version have none
    if own and own != files.sha256_of({**meta, "sha256": hashes}):
        raise UserError(f"{store / INDEX} is damaged; {_AGAIN.format(store)}")
    _check_same(store, meta, expected)
    del meta["sha256"]
    shards = [folder(store, n) for n in range(count(meta))]
    weights = [store / name for name in hashes if name.endswith(".npy")]
    for path in (*shards, *weights):
        _check_whole(path, hashes)
    return meta, shards


def _check_same(store: Path, found: Meta, expected: Meta, hint: str = "") -> None:
    files.check_same(f"{store} holds other soft targets", found, expected, hint)


def _notes(store: Path) -> list[Path]:
    """Those of the shards that are there whole."""
    return sorted(p for p in store.glob(f"shards/*/{NOTE}") if p.parent.name.isdigit())


def _unfinished(store: Path) -> Meta:
    """The meta of the shards that are there."""
    notes = _notes(store)
    if not notes:
        raise UserError(f"no readable soft targets in {store}: no shards are there")
    own = ("sha256", "logits")  # a shard's, not the store's
    return {name: value for name, value in _read(notes[0]).items() if name not in own}


def _read(path: Path) -> Meta:
    """The index of a store, or the note of a shard."""
    store, wrong = (path.parent, path) if path.name == INDEX else (path.parents[2], path.parent)
    try:
        meta = files.read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {_AGAIN.format(wrong)}") from error
    found = (meta.get("format"), meta.get("version")) if isinstance(meta, dict) else (None, None)
    if found != FORMAT:
        what = _AGAIN.format(store) if found[0] in _FORMATS else "it is no store of soft targets"
        raise UserError(
            f"{store} is {found[0]} version {found[1]}; this program reads {FORMAT[0]} version "
            f"{FORMAT[1]}: {what}"
        )
    seal = meta.pop(_SEAL, None)  # an index has its own among the hashes; notes of before have none
    if seal and seal != files.sha256_of(meta):
        raise UserError(f"{path} is damaged; {_AGAIN.format(wrong)}")
    return meta


def _read_note(shard: Path) -> Meta:
    if not shard.exists():
        raise UserError(f"{shard} is not written yet: other writers have to finish first")
    return _read(shard / NOTE)


def _check_whole(path: Path, hashes: Mapping[str, str]) -> None:
    files.check_sha256(path, hashes.get(path.name), _AGAIN.format("it"))


def _check_inputs(shard: Path, start: int, digests: np.ndarray) -> None:
    there = files.read_array(shard / "digests.npy")
    differs = there != digests if len(there) == len(digests) else np.ones(len(digests), bool)
    if differs.any():
        raise UserError(
            f"{differs.sum()} of {len(digests)} examples are not the inputs that {shard} was made of, "
            f"first row {start + differs.argmax()}: the data have changed; {_OTHERS}"
        )
