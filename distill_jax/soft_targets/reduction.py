"""A teacher's predictions, asked for batch by batch and reduced to what a store keeps of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax.errors import UserError
from distill_jax.soft_targets import encodings
from distill_jax.soft_targets.class_maps import map_classes
from distill_jax.soft_targets.encodings import FIELDS, MAX_DRAWS, Encoding
from distill_jax.soft_targets.ensemble import (
    Mean,
    check_mean,
    ensemble_logits,
    mean_probs,
    weighted_mean,
)
from distill_jax.soft_targets.sources import Source

Meta = dict[str, Any]
"""How a store is made: the arguments of `store.write`, and "num_examples"."""


def check(meta: Meta) -> None:
    """Raises a UserError for arguments of `store.write` that don't fit together."""
    encoding, k, num_classes = (meta[name] for name in ("encoding", "k", "num_classes"))
    if not isinstance(meta["teacher"], str):
        raise UserError(f"teacher is {meta['teacher']!r}; expected its fingerprint, text")
    if not meta["num_examples"]:
        raise UserError("soft targets need at least one example; digests is empty")
    if encoding not in FIELDS:
        raise UserError(f"encoding must be one of {', '.join(map(repr, FIELDS))}, not {encoding!r}")
    if encoding == "dense" and k is not None:
        raise UserError(f"k is {k}, but a dense store keeps all classes: leave k out")
    if encoding == "top_k" and (k is None or not 1 <= k <= num_classes):
        raise UserError(f"k must be 1 to the number of classes, {num_classes}, not {k}")
    if encoding == "sampled" and (k is None or not 1 <= k <= MAX_DRAWS):
        raise UserError(f"k must be 1 to {MAX_DRAWS} draws, not {k}")
    if meta["mean"] is not None:
        check_mean(meta["mean"])
    plain = encoding == "dense" and meta["mean"] is None and not meta["probabilities"]
    if meta["views"] is not None and not (plain and meta["class_map"] is None):
        raise UserError(
            "soft targets of views are kept as the dense logits of one teacher: give no other encoding, "
            "no mean, no class_map and no probabilities"
        )
    if meta["class_map"] is not None and meta["probabilities"]:
        raise UserError("class_map is for logits: give no probabilities, or map those yourself")
    _check_temperatures(meta)


def _check_temperatures(meta: Meta) -> None:
    temperatures, mean = meta["temperatures"], meta["mean"]
    given = f"temperatures are {temperatures}"
    if meta["probabilities"] and (mean is not None or len(temperatures or ()) != 1):
        raise UserError(
            f"{given} and mean is {mean!r}, but probabilities are those of one teacher at one "
            "temperature: give that temperature, and no mean"
        )
    if meta["encoding"] == "dense" and mean != "arithmetic" and not meta["probabilities"]:
        if temperatures is not None:
            raise UserError(
                f"{given}, but the dense logits of one teacher or of a geometric mean serve every "
                "temperature: leave them out"
            )
    elif not temperatures or not all(0 < t < np.inf for t in temperatures):
        raise UserError(f"{given}; expected one or several above 0")
    elif len(set(temperatures)) < len(temperatures):
        raise UserError(f"{given}; expected each once")


def has_tail_weights(meta: Meta) -> bool:
    """Whether a store has its targets' mean distribution, by which the rest of each is shared."""
    return meta["encoding"] != "dense" and meta.get("tail") is None


def array_name(field: str, temperature: float | None) -> str:
    """The name of a stored array; None: of one that serves every temperature."""
    return field if temperature is None else f"{field}_T{temperature}"


def encode(
    source: Source, rows: range, ids: np.ndarray | None, *, batch_size: int, meta: Meta
) -> dict[str, np.ndarray]:
    """The arrays of some rows as they are stored, and the sums of their soft targets ("sum", float64).

    Args:
        source: its teacher is called with `batch_size` rows; the last ones may be repeated.
        rows: of the examples.
        ids: int64 `[N]` of all examples; None: their rows.
        batch_size: B.
        meta: of the store.

    Returns:
        the arrays `[n, ...]` of `encodings.FIELDS` and the sums `[C]`, by `array_name`.

    Raises:
        UserError: if the teacher returns another shape, logits that are not finite, or rows that are
            not probabilities.
    """
    batches, running = [], None
    for first in range(rows.start, rows.stop, batch_size):
        count = min(batch_size, rows.stop - first)
        wanted = first + np.minimum(np.arange(batch_size), count - 1)
        output, weights = _ask(source, wanted, meta), source.weights
        if weights is not None and weights.ndim == 2:
            weights = weights[wanted]
        own = wanted if ids is None else ids[wanted]
        reduced = _reduce(output, own, count, meta, weights=weights, class_map=source.class_map)
        if running is not None:
            batches.append(_fetch(*running))  # the device is by now at the next batch
        running = *reduced, own[:count], meta
    assert running is not None
    batches.append(_fetch(*running))
    return {
        name: _join(name, [batch[name] for batch in batches], meta["num_classes"])
        for name in batches[0]
    }


def _ask(source: Source, rows: np.ndarray, meta: Meta) -> Array:
    output, shape = jnp.asarray(source.ask(rows)), (len(rows), source.num_classes)
    expected: tuple[Any, ...] = shape
    if meta["views"] is not None:
        expected = (shape[0], meta["views"]["count"], shape[1])
    elif meta["mean"] is not None:
        expected = ("members" if source.weights is None else source.weights.shape[-1], *shape)
    if len(expected) != output.ndim or any(
        size not in ("members", found) for size, found in zip(expected, output.shape, strict=True)
    ):
        raise UserError(
            f"the teacher returned an array {output.shape} for {shape[0]} rows of {shape[1]} classes, "
            f"with mean {meta['mean']!r}; expected ({', '.join(map(str, expected))})"
        )
    return output


def _reduce(
    output: Array,
    ids: np.ndarray,
    count: int,
    meta: Meta,
    *,
    weights: np.ndarray | None,
    class_map: np.ndarray | None,
) -> tuple[dict[str, Array], Array]:
    """What is kept of a batch at each temperature; and which of its examples are sound, bool `[B]`."""
    mean, probabilities, encoding = (meta[x] for x in ("mean", "probabilities", "encoding"))
    draws_of = jnp.asarray(ids.astype(np.uint32))
    how = {name: meta[name] for name in ("encoding", "k", "seed")}
    good = _are_distributions(output) if probabilities else _are_finite(output, mean is not None)
    if class_map is not None:
        output = map_classes(output, class_map)
    kept: dict[str, Array] = {}
    for temperature in meta["temperatures"] or [None]:
        if encoding == "dense":
            at = 1.0 if temperature is None else temperature  # any, if they serve every one
            how_mean = {"mean": mean, "probabilities": probabilities}
            found = {"logits": _logits(output, at, weights, **how_mean)}
        else:
            members = output if mean else output[None]
            p = output
            if not probabilities:
                p = _mean_probs(members, temperature, mean or "arithmetic", weights)
            found = _cut(p, draws_of, jnp.asarray(count), **how)
        kept |= {array_name(field, temperature): array for field, array in found.items()}
    return kept, good


_mean_probs = jax.jit(mean_probs, static_argnames="mean")


@jax.jit
def _are_distributions(rows: Array) -> Array:
    one = jnp.abs(jnp.sum(rows.astype(jnp.float32), axis=-1) - 1.0) < 0.01  # false for NaN too
    return one & jnp.all(rows >= 0, axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def _are_finite(logits: Array, of_members: bool) -> Array:
    """Which examples have finite logits, of all members or views; bool `[B]`."""
    finite = jnp.isfinite(logits if not of_members else jnp.moveaxis(logits, 0, 1))
    return jnp.all(finite.reshape(len(finite), -1), axis=-1)


@functools.partial(jax.jit, static_argnames=("mean", "probabilities"))
def _logits(
    output: Array,
    temperature: ArrayLike,
    weights: Array | None,
    *,
    mean: Mean | None,
    probabilities: bool,
) -> Array:
    """Logits v float32 `[B, C]` such that `softmax(v / T)` are the soft targets."""
    output = output.astype(jnp.float32)
    if probabilities:
        smallest = jnp.finfo(jnp.float32).tiny
        return jnp.log(jnp.maximum(output, smallest)) * temperature
    if mean is None:
        return output
    if mean == "geometric":  # the softmax of the mean logits, at every temperature
        return weighted_mean(output, weights)
    return ensemble_logits(output, temperature, mean, weights)


@functools.partial(jax.jit, static_argnames=("encoding", "k", "seed"))
def _cut(
    probabilities: Array, ids: Array, count: Array, *, encoding: Encoding, k: int, seed: int
) -> dict[str, Array]:
    """What is kept of a batch, and the sum of its first `count` rows."""
    probabilities = probabilities.astype(jnp.float32)
    if encoding == "sampled":
        offsets = encodings.offsets(seed, ids)
        kept: tuple[Array, ...] = (encodings.sample(probabilities, k, offsets),)
    else:
        kept = encodings.top_k(probabilities, k)
    real = jnp.arange(len(probabilities)) < count
    total = jnp.sum(jnp.where(real[:, None], probabilities, 0.0), axis=0)
    return {**dict(zip(FIELDS[encoding], kept, strict=True)), "sum": total}


def _fetch(
    kept: dict[str, Array], good: Array, ids: np.ndarray, meta: Meta
) -> dict[str, np.ndarray]:
    """A batch's arrays on the host, without the repeated rows."""
    wrong = ~np.asarray(good)[: len(ids)]
    if wrong.any():
        first = f"first for example {ids[wrong.argmax()]}"
        if meta["probabilities"]:
            raise UserError(f"the soft targets are not probabilities with sum 1, {first}")
        raise UserError(f"the teacher's logits are not finite, {first}")
    return {
        name: np.asarray(array) if name.startswith("sum") else np.asarray(array)[: len(ids)]
        for name, array in kept.items()
    }


def _join(name: str, parts: list[np.ndarray], num_classes: int) -> np.ndarray:
    """All batches of an array, as it is stored."""
    if name.startswith("sum"):
        return np.stack(parts).sum(axis=0, dtype=np.float64)
    whole = np.concatenate(parts)
    if name.startswith("steps"):
        return encodings.pack(whole, num_classes)
    if name.startswith("probabilities"):  # bfloat16, which NumPy's format doesn't know, as bits
        return whole.view(np.uint16)
    return whole
