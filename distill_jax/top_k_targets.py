"""Soft targets cut to the k largest probabilities and the sum of the rest; what that costs.

The loss spreads the rest over the other classes (`losses.top_k_soft_cross_entropy`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax import losses
from distill_jax.errors import UserError


def top_k(probabilities: Array, k: int) -> tuple[Array, Array, Array]:
    """The k largest of each example's soft targets.

    The tail is what the other classes really have, and not 1 less the rounded probabilities: rounding
    moves a probability near 1 by up to 2^-9, often more than the whole tail. So probabilities and tail
    sum to 1 within a factor of 1 +- 2^-9, by which a loss weighs the example more or less.

    Args:
        probabilities: `[..., C]` with sum 1.
        k: 1..C.

    Returns:
        ids uint16 (uint32 if C > 65,536) `[..., k]`, probabilities bfloat16 `[..., k]`, falling, and
        tail float32 `[...]`, 0 if k = C.
    """
    num_classes = probabilities.shape[-1]
    if not 1 <= k <= num_classes:
        raise UserError(f"k must be 1 to the number of classes, {num_classes}, not {k}")
    probabilities = probabilities.astype(jnp.float32)
    largest, ids = jax.lax.top_k(probabilities, k)
    zeros = jnp.zeros_like(largest)
    rest = jnp.put_along_axis(probabilities, ids, zeros, axis=-1, inplace=False)
    id_dtype = jnp.uint16 if num_classes <= 2**16 else jnp.uint32
    return ids.astype(id_dtype), largest.astype(jnp.bfloat16), jnp.sum(rest, axis=-1)


def densify(
    ids: Array, probabilities: Array, tail: Array, tail_weights: Array | None, num_classes: int
) -> Array:
    """Dense targets float32 `[..., C]` that the loss gives the same value; to measure and to test.

    Args:
        ids: integer `[..., k]`.
        probabilities: `[..., k]`.
        tail: `[...]`.
        tail_weights: `[C]`; None spreads the tail equally.
        num_classes: C.
    """
    spread = losses.tail_distribution(ids, num_classes, tail_weights)
    dense = tail.astype(jnp.float32)[..., None] * spread
    named = probabilities.astype(jnp.float32)
    return jnp.put_along_axis(dense, ids.astype(jnp.int32), named, axis=-1, inplace=False)


@functools.partial(jax.jit, static_argnames="k")
def compare(
    probabilities: Array,
    k: int,
    logits: Array,
    temperature: ArrayLike,
    tail_weights: Array | None,
) -> dict[str, Array]:
    """What training on the k largest of dense targets changes.

    Args:
        probabilities: dense soft targets `[N, C]`.
        k: kept of them.
        logits: `[N, C]` of a student.
        temperature: of the targets.
        tail_weights: `[C]`; None spreads the tail equally.

    Returns:
        float32 scalars. "kl": mean KL(dense, densified) in nats, infinite where a class with a
        probability has no tail weight. "loss_difference": mean absolute difference of the examples'
        losses, relative to the mean loss. "gradient_cosine": of the losses' gradients with respect to
        all logits.
    """
    kept = top_k(probabilities, k)
    restored = densify(*kept, tail_weights, probabilities.shape[-1])
    restored = restored / jnp.sum(restored, axis=-1, keepdims=True)
    kl = jnp.sum(jax.scipy.special.rel_entr(probabilities, restored), axis=-1)

    def with_gradient(loss: Callable[[Array], Array]) -> tuple[Array, Array]:
        values, pull_back = jax.vjp(loss, logits.astype(jnp.float32))
        return values, pull_back(jnp.ones_like(values))[0]

    dense, dense_gradient = with_gradient(
        lambda z: losses.soft_cross_entropy(z, probabilities, temperature)
    )
    found, gradient = with_gradient(
        lambda z: losses.top_k_soft_cross_entropy(z, *kept, temperature, tail_weights)
    )
    norms = jnp.linalg.norm(gradient) * jnp.linalg.norm(dense_gradient)
    return {
        "kl": jnp.mean(kl),
        "loss_difference": jnp.mean(jnp.abs(found - dense)) / jnp.mean(dense),
        "gradient_cosine": jnp.sum(gradient * dense_gradient) / norms,
    }
