"""Soft targets with a few numbers per example: the k largest probabilities and the sum of the rest.

For many examples of many classes, where dense targets would not fit on a disk. A class id takes 2 bytes
(4 above 65,536 classes), a probability 2 (bfloat16), the rest 4 (float32). The loss spreads the rest
over the other classes in proportion to the teacher's mean distribution over the whole set, which the
store carries (`losses.top_k_soft_cross_entropy`).

An example's id is its row, 0..N-1. The store is written shard by shard; a killed writer goes on.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import training
from distill_jax.errors import UserError
from distill_jax.processes import main_only
from distill_jax.soft_targets import Mean
from distill_jax.top_k_targets import compare as compare
from distill_jax.top_k_targets import densify as densify
from distill_jax.top_k_targets import top_k as top_k

FORMAT, VERSION = "distill_jax.compressed_targets", 1
WEIGHTS = "tail_weights.npy"
FIELDS = ("ids", "probabilities", "tail", "digests")
TargetsOf = Callable[[np.ndarray], ArrayLike]
"""Rows int64 `[B]` -> the soft targets of these examples, probabilities `[B, C]`."""


class Store(NamedTuple):
    """A teacher's word on N examples, each field a list of memory-mapped shards; read with `rows`.

    ids: uint16 or uint32 `[n, k]`. probabilities: bfloat16 `[n, k]`, falling. tail: float32 `[n]`.
    digests: uint64 `[n]`, of each example's input. tail_weights: float32 `[C]`, the mean distribution.
    meta: what `write` was told, and "num_examples".
    """

    ids: list[np.ndarray]
    probabilities: list[np.ndarray]
    tail: list[np.ndarray]
    digests: list[np.ndarray]
    tail_weights: np.ndarray
    meta: dict[str, Any]


def write_steps(
    directory: str | os.PathLike[str],
    targets_of: TargetsOf,
    digests: np.ndarray,
    *,
    num_classes: int,
    k: int,
    temperature: float,
    mean: Mean | None,
    teacher: str,
    data: Mapping[str, str],
    shard_rows: int = 65536,
    batch_size: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[None]:
    """Writes a store, or the shards that an interrupted call with the same arguments left to do.

    A folder with `meta.json`, `shards/00000/` and so on, and `tail_weights.npy`. A shard appears whole
    or not at all, so a kill at any moment loses at most one. Each step is a batch: several stores are
    written side by side, of one pass over a teacher, by taking their steps in turn.

    Args:
        directory: for the store.
        targets_of: called with rows int64 `[batch_size]`, always as many, so that one compiled program
            serves: the last rows of a shard are filled up with its last. An array on the device is
            reduced there, and only its k largest are copied.
        digests: uint64 `[N]`, of all examples' inputs (`soft_targets.digests`).
        num_classes: C.
        k: probabilities kept of each example.
        temperature: that the targets are made at, and good for.
        mean: of an ensemble; None for one teacher.
        teacher: the teacher's fingerprint.
        data: what identifies the inputs and their order, such as {"alignment": "ab12..."}.
        shard_rows: examples of a shard.
        batch_size: examples given to `targets_of` at a time.
        progress: called with the rows that are done and N, after every shard.

    Raises:
        UserError: if the folder holds another store, naming both sides; for a damaged shard; or for
            targets that are not `[B, C]` probabilities.
    """
    directory, digests = Path(directory), np.asarray(digests, np.uint64)
    if not len(digests):
        raise UserError("compressed targets need at least one example; digests is empty")
    if not 1 <= k <= num_classes:
        raise UserError(f"k must be 1 to the number of classes, {num_classes}, not {k}")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "encoding": "top_k",
        "k": k,
        "num_classes": num_classes,
        "temperature": float(temperature),
        "mean": mean,
        "teacher": teacher,
        "data": dict(data),
        "num_examples": len(digests),
        "shard_rows": shard_rows,
    }
    meta["sha256"] = hashes = _start(directory, meta)
    total, batch_size = np.zeros(num_classes), min(batch_size, shard_rows, len(digests))
    for number, start in enumerate(range(0, len(digests), shard_rows)):
        shard, here = _shard(directory, number), digests[start : start + shard_rows]
        if shard.name not in hashes or not shard.exists():
            batches = []
            for batch in _compressed(targets_of, start, len(here), batch_size, num_classes, k):
                batches.append(batch)
                yield
            _write_shard(shard, batches, here)
            hashes[shard.name] = _sha256(shard)
            _write_json(directory / "meta.json", meta)
        _check_whole(shard, hashes)
        differs = np.load(shard / "digests.npy") != here
        if differs.any():
            raise UserError(
                f"{differs.sum()} of {len(here)} examples are not the inputs that {shard} was made of, "
                f"first id {start + differs.argmax()}: the data have changed; remove {directory}"
            )
        total += np.load(shard / "sum.npy")
        if progress is not None:
            progress(start + len(here), len(digests))
    with _whole(directory / WEIGHTS) as partial, partial.open("wb") as file:
        np.save(file, (total / len(digests)).astype(np.float32))
    hashes[WEIGHTS] = _sha256(directory / WEIGHTS)
    _write_json(directory / "meta.json", meta)


@main_only
def write(directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
    """Writes a store: all steps of `write_steps`, with the same arguments."""
    for _ in write_steps(directory, *arguments, **options):
        pass


def load(
    directory: str | os.PathLike[str],
    *,
    teacher: str | None = None,
    data: Mapping[str, str] | None = None,
    num_classes: int | None = None,
) -> Store:
    """Opens a finished store, reading it once to check its SHA-256; None skips a check.

    Args:
        directory: that `write` finished.
        teacher: the fingerprint that the targets must be of.
        data: what must identify the inputs.
        num_classes: C that they must have.

    Raises:
        UserError: naming both sides, for a store of another teacher, of other data, of another class
            count or of a version that is not known; for one that is not finished, or damaged.
    """
    directory = Path(directory)
    meta = _read_meta(directory)
    expected = {"teacher": teacher, "data": data and dict(data), "num_classes": num_classes}
    _check_same(directory, meta, {name: x for name, x in expected.items() if x is not None})
    shards = [_shard(directory, i) for i in range(-(-meta["num_examples"] // meta["shard_rows"]))]
    hashes = meta.pop("sha256")
    if WEIGHTS not in hashes:
        raise UserError(
            f"the compressed targets in {directory} are not finished, {len(hashes)} of {len(shards)} "
            "shards are written: finish them with the same command"
        )
    for path in (*shards, directory / WEIGHTS):
        _check_whole(path, hashes)
    ids, probabilities, tail, digests = (
        [np.load(shard / f"{name}.npy", mmap_mode="r") for shard in shards] for name in FIELDS
    )
    probabilities = [shard.view(jnp.bfloat16) for shard in probabilities]
    return Store(ids, probabilities, tail, digests, np.load(directory / WEIGHTS), meta)


def rows(store: Store, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The targets of some rows, in any order, from whatever shards they are in.

    Args:
        store: from `load`.
        indices: integer `[n]`, each 0..N-1.

    Returns:
        "teacher_ids" `[n, k]`, "teacher_probabilities" bfloat16 `[n, k]` and "teacher_tail" `[n]`.

    Raises:
        UserError: for a row that the store doesn't have.
    """
    fields = zip(training.TOP_K_FIELDS, store[:3], strict=True)
    return {name: _take(store, shards, indices) for name, shards in fields}


def attach(
    examples: Mapping[str, np.ndarray], store: Store, digests: np.ndarray, temperature: float
) -> dict[str, np.ndarray]:
    """Joins soft targets to examples by id, as the three fields of `rows`.

    The examples may be a part of the store's, in any order.

    Args:
        examples: with "id" `[n]`, rows of the store.
        store: from `load`.
        digests: uint64 `[n]`, of the inputs of these examples (`soft_targets.digests`).
        temperature: that training will use.

    Raises:
        UserError: for an id without targets, other inputs under an id, or another temperature.
    """
    ids = np.asarray(examples["id"])
    check(store, ids, digests, temperature)
    return {**examples, **rows(store, ids)}


def check(store: Store, ids: np.ndarray, digests: np.ndarray, temperature: float) -> None:
    """What `attach` checks, for those who read the rows later."""
    teacher, made_at = store.meta["teacher"], store.meta["temperature"]
    if temperature != made_at:
        raise UserError(
            f"the compressed targets of teacher {teacher} were made at temperature {made_at} and can't "
            f"be used at temperature {temperature}"
        )
    if np.shape(digests) != ids.shape:
        raise UserError(f"{len(digests)} digests for {len(ids)} examples")
    differs = _take(store, store.digests, ids) != digests
    if differs.any():
        raise UserError(
            f"{differs.sum()} of {len(ids)} examples are not the inputs that teacher {teacher} saw "
            f"under their ids, first id {ids[differs.argmax()]}: the data have changed since the soft "
            "targets were made; make them again"
        )


def bytes_per_example(store: Store) -> int:
    """What an example takes on the disk, its digest's 8 bytes included."""
    fields = (store.ids, store.probabilities, store.tail, store.digests)
    return sum(shard.nbytes for field in fields for shard in field) // store.meta["num_examples"]


def _take(store: Store, shards: list[np.ndarray], indices: np.ndarray) -> np.ndarray:
    """Rows of one field."""
    size, indices = store.meta["num_examples"], np.asarray(indices)
    missing = indices[(indices < 0) | (indices >= size)]
    if len(missing):
        raise UserError(
            f"{len(missing)} of {len(indices)} examples have no soft targets, first id {missing[0]}; "
            f"the store holds ids 0 to {size - 1} of teacher {store.meta['teacher']}"
        )
    numbers, places = np.divmod(indices, store.meta["shard_rows"])
    taken = np.empty((len(indices), *shards[0].shape[1:]), shards[0].dtype)
    for number in np.unique(numbers):
        here = numbers == number
        taken[here] = shards[number][places[here]]
    return taken


@functools.partial(jax.jit, static_argnames="k")
def _reduce(probabilities: Array, count: Array, k: int) -> tuple[Array, ...]:
    """`top_k` of a batch, the sum of its first `count` rows, and which are distributions."""
    kept = top_k(probabilities, k)
    probabilities = probabilities.astype(jnp.float32)
    real = jnp.arange(len(probabilities)) < count
    total = jnp.sum(jnp.where(real[:, None], probabilities, 0.0), axis=0)
    one = jnp.abs(jnp.sum(probabilities, axis=-1) - 1.0) < 0.01  # false for NaN too
    return *kept, total, one & jnp.all(probabilities >= 0, axis=-1)


def _compressed(
    targets_of: TargetsOf, start: int, size: int, batch_size: int, num_classes: int, k: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Each batch's ids, probabilities, tail and sum; the device is by then at the next batch."""
    running = None
    for first in range(start, start + size, batch_size):
        count = min(batch_size, start + size - first)
        targets = jnp.asarray(targets_of(first + np.minimum(np.arange(batch_size), count - 1)))
        if targets.shape != (batch_size, num_classes):
            raise UserError(
                f"targets_of gave an array {targets.shape} for {batch_size} rows of {num_classes} "
                f"classes; expected ({batch_size}, {num_classes})"
            )
        if running is not None:
            yield _fetch(*running)
        running = first, count, _reduce(targets, jnp.asarray(count), k)
    assert running is not None
    yield _fetch(*running)


def _fetch(first: int, count: int, reduced: tuple[Array, ...]) -> tuple[np.ndarray, ...]:
    ids, probabilities, tail, total, good = (np.asarray(x) for x in reduced)
    if not good[:count].all():
        raise UserError(
            f"the teacher's soft targets are not probabilities with sum 1, first for example "
            f"{first + good.argmin()}"
        )
    return ids[:count], probabilities[:count].view(np.uint16), tail[:count], total


def _shard(directory: Path, number: int) -> Path:
    return directory / "shards" / f"{number:05d}"


def _write_shard(shard: Path, batches: list[tuple[np.ndarray, ...]], digests: np.ndarray) -> None:
    *fields, sums = zip(*batches, strict=True)
    arrays = [np.concatenate(parts) for parts in fields] + [digests]
    with _whole(shard) as partial:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, array in zip(FIELDS, arrays, strict=True):
            np.save(partial / f"{name}.npy", array)
        np.save(partial / "sum.npy", np.sum(sums, axis=0, dtype=np.float64))
        shutil.rmtree(shard, ignore_errors=True)  # one that was killed before its hash was noted


def _sha256(path: Path) -> str:
    """Of a file, or of all arrays in a folder."""
    digest = hashlib.sha256()
    for part in sorted(path.glob("*.npy")) if path.is_dir() else [path]:
        digest.update(part.read_bytes())
    return digest.hexdigest()


def _check_whole(path: Path, hashes: Mapping[str, str]) -> None:
    if not path.exists() or _sha256(path) != hashes.get(path.name):
        raise UserError(
            f"{path} is damaged: its SHA-256 is not the one in meta.json; remove it and give the "
            "command that wrote it again"
        )


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write under; what is there takes the real name at the end, whole."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with _whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1))


def _start(directory: Path, meta: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of what a writer of the same store did already; none if the folder is new."""
    if not (directory / "meta.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        _write_json(directory / "meta.json", {**meta, "sha256": {}})
    found = _read_meta(directory)
    _check_same(directory, found, meta)
    return found["sha256"]


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        meta = json.loads((directory / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"no readable compressed targets in {directory}: {error}") from error
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{directory} is {meta.get('format')} version {meta.get('version')}; this program reads "
            f"{FORMAT} version {VERSION}"
        )
    return meta


def _check_same(directory: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    differences = [
        f"{name} {found.get(name)!r}, not {value!r}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if differences:
        raise UserError(f"the compressed targets in {directory} have {'; '.join(differences)}")
