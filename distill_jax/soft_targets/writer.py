"""Writes stores of soft targets: in one pass over the teacher, by any number of processes, resumed."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax import files, processes
from distill_jax.errors import UserError
from distill_jax.soft_targets import reduction, shard_files
from distill_jax.soft_targets.encodings import Encoding
from distill_jax.soft_targets.ensemble import Mean
from distill_jax.soft_targets.reduction import Meta, Teacher


def write(
    folder: str | os.PathLike[str],
    source: np.ndarray | jax.Array | Sequence[np.ndarray] | Teacher,
    digests: np.ndarray,
    *,
    teacher: str,
    data: Mapping[str, str] | None = None,
    encoding: Encoding = "dense",
    k: int | None = None,
    temperatures: float | Sequence[float] | None = None,
    mean: Mean | None = None,
    probabilities: bool = False,
    ids: np.ndarray | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    shard_rows: int = 65536,
    batch_size: int = 1024,
    shards: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a store, or what an interrupted call left to do.

    The processes of a run all call it, share the shards out, and leave it together. A kill at any
    moment loses at most the shard that is being written. Independent jobs each write some `shards`; a
    call without them, or `finish`, then makes a store of all.

    "dense" logits v `[N, C]`, with `softmax(v / T)` the soft targets, serve every temperature if they
    are one teacher's, or the mean of the members' logits (a geometric mean of their distributions). An
    arithmetic mean, and the other encodings, are good at the given temperatures alone.

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
        progress: called after every shard with the examples that this call has written, and those that
            it has to write.

    Raises:
        UserError: if the folder holds another store, naming both sides, or other files; for arguments
            that don't fit together, ids that repeat, another number of rows or classes, logits that
            are not finite, and rows that are not probabilities; or as `finish` does.

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
    folder, digests = Path(folder), np.asarray(digests, np.uint64)
    ask, num_classes = _teacher(source, len(digests), mean, num_classes)
    ids = _own_ids(ids, len(digests))
    fields = {
        "encoding": encoding,
        "k": k,
        "seed": seed if encoding == "sampled" else None,
        "num_classes": num_classes,
        "temperatures": temperatures if temperatures is None else _as_floats(temperatures),
        "mean": mean,
        "probabilities": probabilities,
        "teacher": teacher,
        "data": dict(data or {}),
        "num_examples": len(digests),
        "ids": None if ids is None else hashlib.sha256(ids.tobytes()).hexdigest()[:16],
        "shard_rows": shard_rows,
    }
    meta: Meta = files.versioned(shard_files.FORMAT, fields)
    reduction.check(meta)
    shard_files.check_started(folder, meta)
    wanted = _dealt(shards, shard_files.count(meta))
    left = [number for number in wanted if not shard_files.folder(folder, number).exists()]
    size, done = sum(len(shard_files.rows(meta, number)) for number in left), 0
    batch_size = min(batch_size, shard_rows, len(digests))
    for number in left:
        rows = shard_files.rows(meta, number)
        if not shard_files.folder(folder, number).exists():  # another writer may be at work
            arrays = reduction.encode(ask, rows, ids, batch_size=batch_size, meta=meta)
            arrays["digests"] = digests[rows.start : rows.stop]
            if ids is not None:
                arrays["ids"] = ids[rows.start : rows.stop]
            shard_files.write(folder, number, arrays, meta)
        done += len(rows)
        if progress is not None:
            progress(done, size)
    processes.wait()
    if shards is None:
        finish(folder, digests)


@processes.main_only
def finish(folder: str | os.PathLike[str], digests: np.ndarray) -> None:
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
    shard_files.finish(Path(folder), np.asarray(digests, np.uint64))


def _teacher(
    source: Any, size: int, mean: Mean | None, num_classes: int | None
) -> tuple[Teacher, int]:
    """What is asked for rows, and C."""
    if callable(source):
        if num_classes is None:
            raise UserError("the teacher is a function: give num_classes too")
        return source, num_classes
    single = isinstance(source, np.ndarray | jax.Array)
    members = [np.asarray(logits) for logits in ([source] if single else source)]
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


def _own_ids(ids: np.ndarray | None, size: int) -> np.ndarray | None:
    """Ids int64 `[N]`; None if they are the rows, which need not be stored."""
    if ids is None:
        return None
    ids = np.asarray(ids, np.int64)
    if ids.shape != (size,):
        raise UserError(f"ids are {ids.shape} for {size} digests; expected ({size},)")
    if len(np.unique(ids)) != size:
        raise UserError("soft targets need examples with distinct ids")
    return None if np.array_equal(ids, np.arange(size)) else ids


def _as_floats(temperatures: float | Sequence[float]) -> list[float]:
    return sorted(np.atleast_1d(np.asarray(temperatures, np.float64)).tolist())


def _dealt(shards: Sequence[int] | None, count: int) -> Sequence[int]:
    """Those that this process of a run writes, of some or all of a store's shards."""
    shards = range(count) if shards is None else shards
    wrong = [number for number in shards if not 0 <= number < count]
    if wrong:
        raise UserError(f"no shard {wrong[0]}; the store has {count}, numbered from 0")
    index = 0 if processes.count() == 1 else jax.process_index()
    return shards[index :: processes.count()]
