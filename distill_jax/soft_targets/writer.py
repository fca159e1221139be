"""Writes stores of soft targets: in one pass over the teacher, by any number of processes, resumed."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from distill_jax.errors import UserError
from distill_jax.soft_targets import identity, reduction, shard_writer, sources
from distill_jax.soft_targets.class_maps import check_class_map
from distill_jax.soft_targets.encodings import Encoding
from distill_jax.soft_targets.ensemble import Mean

BATCH_SIZE = 1024
"""Examples that a teacher is asked for at a time."""


def write(
    folder: str | os.PathLike[str],
    source: ArrayLike | Sequence[ArrayLike] | sources.Teacher,
    digests: ArrayLike,
    *,
    teacher: str,
    data: Mapping[str, str] | None = None,
    encoding: Encoding = "dense",
    k: int | None = None,
    temperatures: float | Sequence[float] | None = None,
    mean: Mean | None = None,
    weights: ArrayLike | None = None,
    class_map: ArrayLike | None = None,
    views: sources.Views | None = None,
    probabilities: bool = False,
    ids: ArrayLike | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    shard_rows: int = 65536,
    batch_size: int = BATCH_SIZE,
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
            `[M, B, C]` of members. Of V views `[N, V, C]` or `[B, V, C]`. It is called with as many
            rows each time, so that one compiled program serves; what it returns on the device is reduced
            there. In a run of several processes each calls its own: it must not be a program that they
            have to run together.
        digests: uint64 `[N]`, of the inputs that the teacher saw (`soft_targets.digests`).
        teacher: the teacher's fingerprint.
        data: what identifies the inputs and their order, such as {"alignment": "ab12..."}.
        encoding: "dense", "top_k" or "sampled" (see `encodings`).
        k: of "top_k", probabilities kept of each example; of "sampled", classes drawn.
        temperatures: one or several that the targets are made at.
        mean: "arithmetic" or "geometric", of an ensemble; None for one teacher.
        weights: of an ensemble's members, `[M]`, or `[N, M]` for each example its own, at least 0; each
            example's are divided by their sum. None: all members count the same.
        class_map: int `[S]`, for each of the student's S classes the teacher's, or -1 if it has none
            (`soft_targets.map_classes`). The store then has S classes. A member's distribution is mapped
            before the mean.
        views: the scheme of augmented views that the source has the logits of (`data.augment.shifts`);
            the digests are those of the inputs as they are. `soft_targets.write_views` makes the logits.
        probabilities: the source returns probabilities `[B, C]`, at the one temperature given.
        ids: int64 `[N]` of the examples, distinct; None: 0..N-1.
        num_classes: C of the teacher, if it is a function.
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
    digests = identity.as_digests(digests)
    made_of = sources.read(source, len(digests), mean, num_classes, views=views)
    if weights is not None:
        made_of = made_of._replace(
            weights=sources.read_weights(weights, source, mean, len(digests))
        )
    if class_map is not None:
        made_of = made_of._replace(class_map=check_class_map(class_map, made_of.num_classes))
    ids = identity.own_ids(ids, len(digests))
    fields = {
        "encoding": encoding,
        "k": k if k is None else sources.number("k", k),
        "seed": sources.number("seed", seed) if encoding == "sampled" else None,
        "num_classes": made_of.num_classes if class_map is None else len(np.asarray(class_map)),
        "temperatures": temperatures if temperatures is None else _as_floats(temperatures),
        "mean": mean,
        "weights": sources.noted(made_of.weights),
        "class_map": sources.noted(made_of.class_map),
        "views": sources.describe_views(views),
        "tail": None,
        "probabilities": probabilities,
    }
    meta = shard_writer.make_meta(
        fields, digests, ids, teacher=teacher, data=data, shard_rows=shard_rows
    )
    reduction.check(meta)
    batch_size = min(sources.number("batch_size", batch_size, 1), shard_rows, len(digests))
    shard_writer.write_shards(
        folder,
        meta,
        digests,
        ids,
        encode=lambda rows: reduction.encode(made_of, rows, ids, batch_size=batch_size, meta=meta),
        made_of=None if callable(source) else functools.partial(sources.digest, made_of.ask),
        shards=shards,
        overwrite=overwrite,
        progress=progress,
    )


def _as_floats(temperatures: ArrayLike) -> list[float]:
    try:
        return sorted(np.ravel(np.asarray(temperatures, np.float64)).tolist())
    except (TypeError, ValueError) as error:
        raise UserError(f"temperatures are {temperatures!r}; expected numbers") from error
