"""What is kept of soft targets, batch by batch: the k largest probabilities, or k classes drawn."""

import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import sampled_targets
from distill_jax.errors import UserError
from distill_jax.target_shards import Meta
from distill_jax.top_k_targets import top_k

Encoding = Literal["top_k", "sampled"]
FIELDS = {"top_k": ("ids", "probabilities", "tail"), "sampled": ("steps",)}
TargetsOf = Callable[[np.ndarray], ArrayLike]
"""Rows int64 `[B]` -> the soft targets of these examples, probabilities `[B, C]`."""


def check(meta: Meta) -> None:
    """Raises a UserError for an encoding, a k or a number of examples that can't be."""
    encoding, k, num_classes = (meta[name] for name in ("encoding", "k", "num_classes"))
    if not meta["num_examples"]:
        raise UserError("compressed targets need at least one example; digests is empty")
    if encoding not in FIELDS:
        raise UserError(f"encoding must be {' or '.join(map(repr, FIELDS))}, not {encoding!r}")
    if encoding == "top_k" and not 1 <= k <= num_classes:
        raise UserError(f"k must be 1 to the number of classes, {num_classes}, not {k}")
    if encoding == "sampled" and not 1 <= k <= sampled_targets.MAX_DRAWS:
        raise UserError(f"k must be 1 to {sampled_targets.MAX_DRAWS} draws, not {k}")


def batches(
    targets_of: TargetsOf, rows: range, batch_size: int, meta: Meta
) -> Iterator[tuple[np.ndarray, ...]]:
    """Each batch's fields and the sum of its soft targets; the device is by then at the next batch.

    Args:
        targets_of: called with `batch_size` rows; the last ones may be repeated.
        rows: of the examples.
        batch_size: B.
        meta: with "encoding", "k", "seed" and "num_classes".

    Raises:
        UserError: for targets that are not `[B, C]` probabilities.
    """
    running = None
    for first in range(rows.start, rows.stop, batch_size):
        count = min(batch_size, rows.stop - first)
        wanted = first + np.minimum(np.arange(batch_size), count - 1)
        targets = jnp.asarray(targets_of(wanted))
        if targets.shape != (batch_size, meta["num_classes"]):
            raise UserError(
                f"targets_of gave an array {targets.shape} for {batch_size} rows of "
                f"{meta['num_classes']} classes; expected ({batch_size}, {meta['num_classes']})"
            )
        if running is not None:
            yield _fetch(*running)
        how = {name: meta[name] for name in ("encoding", "k", "seed")}
        ids = jnp.asarray(wanted.astype(np.uint32))
        running = first, count, _reduce(targets, ids, jnp.asarray(count), **how)
    assert running is not None
    yield _fetch(*running)


def concatenate(batches: list[tuple[np.ndarray, ...]], meta: Meta) -> dict[str, np.ndarray]:
    """All batches' arrays by name as they are stored, and "sum"."""
    *fields, sums = zip(*batches, strict=True)
    arrays = dict(zip(FIELDS[meta["encoding"]], map(np.concatenate, fields), strict=True))
    if "steps" in arrays:
        arrays["steps"] = sampled_targets.pack(arrays["steps"], meta["num_classes"])
    else:  # bfloat16, which NumPy's format doesn't know, as bits
        arrays["probabilities"] = arrays["probabilities"].view(np.uint16)
    return {**arrays, "sum": np.stack(sums).sum(axis=0, dtype=np.float64)}


@functools.partial(jax.jit, static_argnames=("encoding", "k", "seed"))
def _reduce(
    probabilities: Array, rows: Array, count: Array, encoding: Encoding, k: int, seed: int
) -> tuple[Array, ...]:
    """What is kept of a batch, the sum of its first `count` rows, and which are distributions."""
    probabilities = probabilities.astype(jnp.float32)
    if encoding == "sampled":
        offsets = sampled_targets.offsets(seed, rows)
        kept: tuple[Array, ...] = (sampled_targets.sample(probabilities, k, offsets),)
    else:
        kept = top_k(probabilities, k)
    real = jnp.arange(len(probabilities)) < count
    total = jnp.sum(jnp.where(real[:, None], probabilities, 0.0), axis=0)
    one = jnp.abs(jnp.sum(probabilities, axis=-1) - 1.0) < 0.01  # false for NaN too
    return *kept, total, one & jnp.all(probabilities >= 0, axis=-1)


def _fetch(first: int, count: int, reduced: tuple[Array, ...]) -> tuple[np.ndarray, ...]:
    *kept, total, good = (np.asarray(x) for x in reduced)
    if not good[:count].all():
        raise UserError(
            f"the teacher's soft targets are not probabilities with sum 1, first for example "
            f"{first + good.argmin()}"
        )
    return *(field[:count] for field in kept), total
