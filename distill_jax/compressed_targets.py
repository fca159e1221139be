"""Soft targets with a few numbers per example, for sets whose dense targets would not fit on a disk.

"top_k": the k largest probabilities and the sum of the rest. A class id takes 2 bytes (4 above 65,536
classes), a probability 2 (bfloat16), the rest 4 (float32). The loss spreads the rest over the other
classes in proportion to the teacher's mean distribution over the whole set, which the store carries
(`losses.top_k_soft_cross_entropy`).

"sampled": k classes drawn in proportion to their probabilities (`sampled_targets`), mostly a byte each.
On average over the draws, the loss and its gradient are those of the dense targets.

An example's id is its row, 0..N-1. The store is written shard by shard, by any number of processes; a
killed writer goes on.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import (
    processes,
    sampled_targets,
    soft_targets,
    target_encodings,
    target_shards,
    train_step,
)
from distill_jax.errors import UserError
from distill_jax.soft_targets import Mean
from distill_jax.target_encodings import FIELDS, Encoding, TargetsOf
from distill_jax.target_shards import FORMAT, VERSION, WEIGHTS, Meta
from distill_jax.top_k_targets import compare as compare
from distill_jax.top_k_targets import densify as densify
from distill_jax.top_k_targets import top_k as top_k


class Store(NamedTuple):
    """A teacher's word on N examples, each field a list of memory-mapped shards; read with `rows`.

    ids: uint16 or uint32 `[n, k]`; of a "sampled" store the steps between them, as from
    `sampled_targets.pack`. probabilities: bfloat16 `[n, k]`, falling. tail: float32 `[n]`; a "sampled"
    store has neither of these two. digests: uint64 `[n]`, of each example's input. tail_weights:
    float32 `[C]`, the mean distribution. meta: what `write` was told, and "num_examples".
    """

    ids: list[np.ndarray]
    probabilities: list[np.ndarray]
    tail: list[np.ndarray]
    digests: list[np.ndarray]
    tail_weights: np.ndarray
    meta: Meta


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
    encoding: Encoding = "top_k",
    seed: int = 0,
    shard_rows: int = 65536,
    batch_size: int = 1024,
    shards: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[None]:
    """Writes the shards of a store that are not there yet; those of this process, if a run has several.

    Each step is a batch: several stores are written side by side, of one pass over a teacher, by taking
    their steps in turn (`run_steps`). Then `finish` makes a store of the shards, whoever wrote them.
    A kill at any moment loses at most the shard that is being written (`target_shards`).

    Args:
        directory: for the store.
        targets_of: called with rows int64 `[batch_size]`, always as many, so that one compiled program
            serves: the last rows of a shard are filled up with its last. An array on the device is
            reduced there, and only what is kept is copied. In a run of several processes each calls its
            own, for its own shards: it must not be a program that they have to run together.
        digests: uint64 `[N]`, of all examples' inputs (`soft_targets.digests`).
        num_classes: C.
        k: probabilities kept of each example; of a "sampled" store, classes drawn.
        temperature: that the targets are made at, and good for.
        mean: of an ensemble; None for one teacher.
        teacher: the teacher's fingerprint.
        data: what identifies the inputs and their order, such as {"alignment": "ab12..."}.
        encoding: "top_k" or "sampled".
        seed: of the draws, each a function of the seed, the example's id and its soft targets alone.
        shard_rows: examples of a shard.
        batch_size: examples given to `targets_of` at a time.
        shards: numbers of those to write, for independent processes that share a store out; None: all.
            Of these, process i of n of a run takes the i-th, (i + n)-th and so on.
        progress: called after every shard with the examples that this call has written, and those that
            it has to write.

    Raises:
        UserError: if the folder holds another store, naming both sides; for an encoding, k or shard
            that can't be; or for targets that are not `[B, C]` probabilities.
    """
    directory, digests = Path(directory), np.asarray(digests, np.uint64)
    meta: Meta = {
        "format": FORMAT,
        "version": VERSION,
        "encoding": encoding,
        "k": k,
        "seed": seed if encoding == "sampled" else None,
        "num_classes": num_classes,
        "temperature": float(temperature),
        "mean": mean,
        "teacher": teacher,
        "data": dict(data),
        "num_examples": len(digests),
        "shard_rows": shard_rows,
    }
    target_encodings.check(meta)
    target_shards.check_started(directory, meta)
    left = [
        number
        for number in _dealt(shards, target_shards.count(meta))
        if not target_shards.folder(directory, number).exists()
    ]
    size, done = sum(len(target_shards.examples(meta, number)) for number in left), 0
    batch_size = min(batch_size, shard_rows, len(digests))
    for number in left:
        rows = target_shards.examples(meta, number)
        if not target_shards.folder(directory, number).exists():  # another writer may be at work
            batches = []
            for batch in target_encodings.batches(targets_of, rows, batch_size, meta):
                batches.append(batch)
                yield
            arrays = target_encodings.concatenate(batches, meta)
            arrays["digests"] = digests[rows.start : rows.stop]
            target_shards.write(directory, number, arrays, meta)
        done += len(rows)
        if progress is not None:
            progress(done, size)


def run_steps(*writers: Iterable[None]) -> None:
    """Takes the steps of one or several `write_steps` in turn, to the end of all.

    All processes of a run call it, and leave it together. One that fails ends the others too, if it
    ends with `processes.leave`, as the command line does; the shards that are written stay.
    """
    for _ in itertools.zip_longest(*writers):
        pass
    processes.wait()


@processes.main_only
def finish(directory: str | os.PathLike[str], digests: np.ndarray) -> None:
    """Checks that all shards are there, whole and of these inputs, and writes the store's index.

    All processes of a run call it, and process 0 does the work.

    Args:
        directory: of the store.
        digests: uint64 `[N]`, of all examples' inputs.

    Raises:
        UserError: for a shard that is missing, damaged, of another store or of other inputs.
    """
    target_shards.finish(Path(directory), np.asarray(digests, np.uint64))


def write(
    directory: str | os.PathLike[str], targets_of: TargetsOf, digests: np.ndarray, **options: Any
) -> None:
    """Writes a store, or what an interrupted call left to do: `write_steps`, run, and `finish`.

    Arguments as for `write_steps`, and errors as of both. The processes of a run all call it, and share
    the shards out.
    """
    run_steps(write_steps(directory, targets_of, digests, **options))
    finish(directory, digests)


def write_logits(
    directory: str | os.PathLike[str],
    logits: np.ndarray | Sequence[np.ndarray],
    digests: np.ndarray,
    *,
    temperature: float,
    mean: Mean | None = None,
    **options: Any,
) -> None:
    """Writes a store of any teacher's logits: of PyTorch, ONNX or an API, as NumPy arrays or memmaps.

    A teacher that can be asked for some examples at a time needs no such array:
    `write(directory, lambda rows: losses.softmax(ask(rows), temperature), ...)`.

    Args:
        directory: for the store.
        logits: floating `[N, C]`, row i of example i; or of each member of an ensemble.
        digests: uint64 `[N]`, of the inputs that the teacher saw (`soft_targets.digests`).
        temperature: to make the targets at.
        mean: of an ensemble's members; None for one teacher.
        options: the further ones of `write_steps`; C is taken from the logits.

    Raises:
        UserError: for arrays that are not `[N, C]` with N digests, or not finite; for an ensemble
            without a mean; and as `write` does.
    """
    members = [logits] if isinstance(logits, np.ndarray) else list(logits)
    shapes = {member.shape for member in members}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 2 or shape[0] != len(digests):
        raise UserError(
            f"logits are {', '.join(map(str, sorted(shapes))) or 'none'} for {len(digests)} digests; "
            f"expected arrays ({len(digests)}, C), of each teacher one"
        )
    if (mean is None) != (len(members) == 1):
        raise UserError(
            f"mean is {mean!r} for {len(members)} arrays of logits; expected 'arithmetic' or "
            "'geometric' for an ensemble, and None for one teacher"
        )

    def targets_of(rows: np.ndarray) -> Array:
        some = np.stack([member[rows] for member in members]).astype(np.float32)
        good = np.isfinite(some).all(axis=(0, 2))
        if not good.all():
            raise UserError(f"the logits are not finite, first for example {rows[good.argmin()]}")
        return _mean_probs(some, temperature, mean or "arithmetic")

    write(
        directory,
        targets_of,
        digests,
        num_classes=shape[1],
        temperature=temperature,
        mean=mean,
        **options,
    )


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
    expected = {"teacher": teacher, "data": data and dict(data), "num_classes": num_classes}
    meta, shards = target_shards.open_finished(
        directory, {name: x for name, x in expected.items() if x is not None}
    )
    names = FIELDS[meta["encoding"]]
    fields = {
        name: [np.load(shard / f"{name}.npy", mmap_mode="r") for shard in shards]
        for name in (*names, "digests")
    }
    return Store(
        fields[names[0]],
        [shard.view(jnp.bfloat16) for shard in fields.get("probabilities", [])],
        fields.get("tail", []),
        fields["digests"],
        np.load(directory / WEIGHTS),
        meta,
    )


def rows(store: Store, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The targets of some rows, in any order, from whatever shards they are in.

    Args:
        store: from `load`.
        indices: integer `[n]`, each 0..N-1.

    Returns:
        "teacher_ids" `[n, k]`, "teacher_probabilities" bfloat16 `[n, k]` and "teacher_tail" `[n]`. Of a
        "sampled" store float32 `[n, 1]`, which is 1 / k, and zeros: the same loss serves both.

    Raises:
        UserError: for a row that the store doesn't have.
    """
    kept = [_take(store, shards, indices) for shards in store[:3] if shards]
    if store.meta["encoding"] == "sampled":
        ids = sampled_targets.unpack(kept[0], store.meta["k"], store.meta["num_classes"])
        kept = [*sampled_targets.as_targets(ids)]
    return dict(zip(train_step.TOP_K_FIELDS, kept, strict=True))


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


def _dealt(shards: Sequence[int] | None, count: int) -> Sequence[int]:
    """Those that this process of a run writes, of some or all of a store's shards."""
    shards = range(count) if shards is None else shards
    wrong = [number for number in shards if not 0 <= number < count]
    if wrong:
        raise UserError(f"no shard {wrong[0]}; the store has {count}, numbered from 0")
    index = 0 if processes.count() == 1 else jax.process_index()
    return shards[index :: processes.count()]


_mean_probs = jax.jit(soft_targets.mean_probs, static_argnames="mean")
