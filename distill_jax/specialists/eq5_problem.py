"""Eq. 5 of the paper for one example, as numbers: what each model names, and with which probabilities.

`eq5` says what patterns are and what the sums are for, and solves the problem.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax import shapes

SMALLEST = 1e-30  # of the probabilities


class Problem(NamedTuple):
    """Eq. 5 for one example, in both directions; model 0 is the generalist.

    names: float `[1 + A, n]`, 1 where the model names the classes of the pattern, else 0.
    dustbins: `[1 + A]`, d_m; 0 where the dustbin has no term.
    patterns: int32 `[C]`, the pattern of each class.
    sums: `[C]`, a_i. masses: `[n]`, a_p. log_means: `[C]`, l_i. log_masses: `[n]`, log Z_p.
    """

    names: Array
    dustbins: Array
    patterns: Array
    sums: Array
    masses: Array
    log_means: Array
    log_masses: Array


def pose(generalist: Array, specialists: Array, class_sets: Array, active: Array) -> Problem:
    """States the problem of one example.

    Args:
        generalist: logits `[C]`.
        specialists: logits `[A, S + 1]`, that of the dustbin last; -inf where the set is padded.
        class_sets: int32 `[A, S]`; C where padded.
        active: bool `[A]`; the other specialists are ignored.

    Returns:
        The problem, with 2^A patterns, or one for each class if that is fewer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax.specialists import eq5
        >>> generalist = jnp.log(jnp.array([0.5, 0.3, 0.2]))
        >>> specialists = jnp.log(jnp.array([[0.2, 0.7, 0.1]]))  # classes 0 and 1, and the dustbin
        >>> problem = eq5.pose(generalist, specialists, jnp.array([[0, 1]]), jnp.array([True]))
        >>> print(problem.sums, problem.dustbins)
        [0.7 1. 0.2] [0. 0.1]
    """
    sizes = shapes.check(
        generalist=(generalist, "float C"),
        class_sets=(class_sets, "int A? S"),
        active=(active, "bool A?"),
    )
    shapes.check(specialists=(specialists, f"float {sizes['A']} {sizes['S'] + 1}"))
    num_classes = generalist.shape[0]
    log_generalist, log_specialists = _log_probs(generalist), _log_probs(specialists)
    log_named, log_dustbins = log_specialists[:, :-1], log_specialists[:, -1]
    sets = jnp.where(active[:, None], class_sets.astype(jnp.int32), num_classes)
    patterns, inside = _patterns(sets, num_classes)
    n = inside.shape[1]

    sums = jnp.exp(log_generalist).at[sets].add(jnp.exp(log_named), mode="drop")
    masses = jax.ops.segment_sum(sums, patterns, n)
    with_term = active & jnp.any(~inside & (masses > 0)[None], axis=1)
    dustbins = jnp.where(with_term, jnp.exp(log_dustbins), 0.0)

    vetoes = jnp.any((active & jnp.isneginf(log_dustbins))[:, None] & ~inside, axis=0)
    models = 1 + jnp.sum(inside, axis=0, dtype=sums.dtype)
    log_means = log_generalist.at[sets].add(log_named, mode="drop") / models[patterns]
    log_means = jnp.where(vetoes[patterns], -jnp.inf, log_means)
    return Problem(
        names=jnp.pad(inside.astype(sums.dtype), ((1, 0), (0, 0)), constant_values=1),
        dustbins=jnp.pad(dustbins, (1, 0)),
        patterns=patterns,
        sums=sums,
        masses=masses,
        log_means=log_means,
        log_masses=_segment_logsumexp(log_means, patterns, n),
    )


def _log_probs(logits: Array) -> Array:
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    log_p = jnp.maximum(jax.nn.log_softmax(logits), math.log(SMALLEST))
    return jnp.where(jnp.isneginf(logits), -jnp.inf, log_p)


def _patterns(sets: Array, num_classes: int) -> tuple[Array, Array]:
    """Each class's pattern, int32 `[C]`, and whether it is in the sets, bool `[A, n]`."""
    bits = (1 << jnp.arange(len(sets), dtype=jnp.int32))[:, None]
    if 2 ** len(sets) <= num_classes:
        nothing = jnp.zeros(num_classes, jnp.int32)
        patterns = nothing.at[sets].add(jnp.broadcast_to(bits, sets.shape), mode="drop")
        return patterns, (jnp.arange(2 ** len(sets), dtype=jnp.int32)[None] & bits) > 0
    nothing = jnp.zeros((len(sets), num_classes), bool)
    inside = nothing.at[jnp.arange(len(sets))[:, None], sets].set(True, mode="drop")
    return jnp.arange(num_classes, dtype=jnp.int32), inside


def _segment_logsumexp(values: Array, segments: Array, n: int) -> Array:
    top = jax.ops.segment_max(values, segments, n)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return top + jnp.log(jax.ops.segment_sum(jnp.exp(values - top[segments]), segments, n))
