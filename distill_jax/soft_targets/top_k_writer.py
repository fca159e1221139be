"""Stores of soft targets of teachers that give a few classes' log-probabilities, as services do."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from distill_jax import ranges, shapes
from distill_jax.errors import UserError
from distill_jax.soft_targets import identity, shard_writer, sources
from distill_jax.soft_targets.encodings import FIELDS
from distill_jax.soft_targets.reduction import array_name

TOLERANCE = 1e-3
"""By how much an example's probabilities may sum to more than 1."""

Tail = Literal["spread", "drop"]


def write_top_k(
    folder: str | os.PathLike[str],
    classes: ArrayLike,
    log_probabilities: ArrayLike,
    digests: ArrayLike,
    *,
    teacher: str,
    num_classes: int,
    temperature: float = 1.0,
    tail: Tail = "spread",
    data: Mapping[str, str] | None = None,
    ids: ArrayLike | None = None,
    shard_rows: int = 65536,
    **options: Any,
) -> None:
    """Writes a store of a few log-probabilities of each example; nothing of the size C is ever made.

    What an example's probabilities leave of 1 is either shared equally by all other classes, as
    `top_k_losses.tail_distribution` does without weights, or dropped, and the probabilities divided by
    their sum. The store is one of "top_k": `load`, `check`, `attach` and `rows` read it, at its
    temperature alone, and its `tail_weights` are None. Probabilities are kept as bfloat16, which rounds
    them by up to 2^-9.

    Args:
        folder: for the store, and nothing else.
        classes: int `[N, k]`, 0..C-1, of an example each once; below 0 is padding.
        log_probabilities: float `[N, k]`, natural logarithms. -inf is padding too: nothing is known of
            such a class, which has a part of the rest like all others. Padding must be -inf.
        digests, teacher, data, ids, shard_rows: as for `soft_targets.write`.
        num_classes: C.
        temperature: that the probabilities are of: 1 unless you asked for another.
        tail: "spread" or "drop".
        options: others of `soft_targets.write`: shards, overwrite, progress.

    Raises:
        UserError: as `soft_targets.write`; for arrays of other shapes, a class twice or beyond C,
            padding with a probability, no class at all, and probabilities that sum to more than 1.001.

    Examples:
        >>> import tempfile
        >>> from distill_jax import soft_targets
        >>> texts, folder = np.array(["to be or", "the rest is"]), tempfile.mkdtemp()
        >>> tokens, logs = np.array([[17, 5], [90_000, -1]]), np.array([[-0.25, -2.5], [-0.5, -np.inf]])
        >>> digests, how = soft_targets.digests(texts), {"teacher": "a service", "num_classes": 128_000}
        >>> soft_targets.write_top_k(folder, tokens, logs, digests, **how)
        >>> found = soft_targets.rows(soft_targets.load(folder), [1], 1.0)
        >>> print(found["teacher_ids"], found["teacher_probabilities"], found["teacher_tail"])
        [[90000 -1]] [[0.605469 0]] [0.393]
    """
    digests = identity.as_digests(digests)
    classes, logs = np.asarray(classes), np.asarray(log_probabilities)
    size = len(digests)
    shapes.check(classes=(classes, f"int {size} k"), log_probabilities=(logs, f"float {size} k"))
    # The same store of any program's arrays.
    classes, logs = classes.astype(np.int64), logs.astype(np.float32)
    ranges.check(temperature=temperature, num_classes=num_classes)
    ranges.check_value("tail", tail, ranges.one_of("spread", "drop"))
    own = identity.own_ids(ids, size)
    fields = {
        "encoding": "top_k",
        "k": classes.shape[1],
        "seed": None,
        "num_classes": sources.number("num_classes", num_classes),
        "temperatures": [float(temperature)],
        "mean": None,
        "weights": None,
        "class_map": None,
        "views": None,
        "tail": tail,
        "probabilities": True,
    }

    def made_of(rows: range) -> str:
        here = slice(rows.start, rows.stop)
        return hashlib.sha256(classes[here].tobytes() + logs[here].tobytes()).hexdigest()

    def encode(rows: range) -> dict[str, np.ndarray]:
        here = slice(rows.start, rows.stop)
        names = np.arange(rows.start, rows.stop) if own is None else own[here]
        kept = _keep(classes[here], logs[here], names, num_classes, drop=tail == "drop")
        stored = [array_name(field, float(temperature)) for field in FIELDS["top_k"]]
        return dict(zip(stored, kept, strict=True))

    meta = shard_writer.make_meta(
        fields, digests, own, teacher=teacher, data=data, shard_rows=shard_rows
    )
    how = {"encode": encode, "made_of": made_of, **options}
    shard_writer.write_shards(folder, meta, digests, own, **how)


def _keep(
    classes: np.ndarray, logs: np.ndarray, names: np.ndarray, num_classes: int, *, drop: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes, probabilities and tail of some examples, as they are stored; their ids for messages."""
    unnamed = classes < 0
    classes = np.where(np.isneginf(logs), -1, classes)
    ordered = np.sort(classes, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    p = np.exp(np.where(np.isneginf(logs), -np.inf, logs.astype(np.float64)))
    sums = p.sum(axis=1)
    for wrong, what in (
        (
            np.isnan(logs) | (logs == np.inf),
            "a log-probability that is not a number below infinity",
        ),
        (
            unnamed & ~np.isneginf(logs),
            "padding, a class below 0, whose log-probability isn't -inf",
        ),
        (classes >= num_classes, f"a class of {num_classes} or more"),
        (twice, "a class twice"),
        (sums > 1 + TOLERANCE, "probabilities that sum to more than 1: are they logarithms?"),
        (sums == 0, "no class with a probability"),
    ):
        found = wrong.reshape(len(names), -1).any(axis=1)
        if found.any():
            first = found.argmax()
            raise UserError(
                f"{found.sum()} of {len(names)} examples have {what}; the first, id {names[first]}, "
                f"has the classes {classes[first][:4].tolist()} and the log-probabilities "
                f"{logs[first][:4].tolist()}"
            )
    if drop:
        p = p / sums[:, None]
    rest = np.zeros(len(p)) if drop else np.maximum(1 - sums, 0)
    dtype = np.int16 if num_classes <= 2**15 else np.int32
    kept = p.astype(jnp.bfloat16).view(np.uint16)  # as bits: NumPy's files have no bfloat16
    return classes.astype(dtype), kept, rest.astype(np.float32)
