"""Soft targets cut to the k largest probabilities and the sum of the rest; what compression costs.

The loss spreads the rest over the other classes (`losses.top_k_soft_cross_entropy`). Drawn classes
(`sampled_targets`) are the same three fields, so `densify` and `compare` serve both.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax import losses
from distill_jax.errors import UserError

Kept = tuple[Array, Array, Array]
"""What is kept of N examples' targets: ids, probabilities and tail, as `top_k` gives them."""


def top_k(probabilities: Array, k: int) -> Kept:
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
        ids: integer `[..., k]`; what is drawn repeatedly adds up.
        probabilities: `[..., k]`, or `[..., 1]` for all k.
        tail: `[...]`.
        tail_weights: `[C]`; None spreads the tail equally.
        num_classes: C.
    """
    spread = losses.tail_distribution(ids, num_classes, tail_weights)
    dense = tail.astype(jnp.float32)[..., None] * spread
    named = jnp.broadcast_to(probabilities.astype(jnp.float32), ids.shape)
    add = jnp.vectorize(lambda row, k, p: row.at[k].add(p), signature="(c),(k),(k)->(c)")
    return add(dense, ids.astype(jnp.int32), named)


@jax.jit
def compare(
    probabilities: Array,
    kept: Sequence[Kept],
    logits: Array,
    temperature: ArrayLike,
    tail_weights: Array | None,
) -> dict[str, Array]:
    """What training on compressed targets changes, against dense ones.

    The errors of the examples' gradients, with respect to their logits, are split in two. The noise of
    drawn targets is what an example's error differs by from draw to draw: it averages out over
    examples. The bias is what the errors of all examples and draws have in common, the norm of their
    mean, which no number of examples takes away. Both are relative to the root mean square norm of the
    examples' dense gradients (the norm of their mean goes to 0 as a student converges). So in a mean
    over more than `(gradient_noise / gradient_bias)^2` examples the bias is the larger one.

    With one compression the bias is the norm of the examples' mean error. Of several, drawn
    independently, its square is estimated by the mean product of two different ones' mean errors, in
    which noise has no part; where that is negative, as half of the time without a bias, by 0.

    Args:
        probabilities: dense soft targets `[N, C]`.
        kept: R compressions of them: ids `[N, k]`, probabilities `[N, k]` or `[N, 1]`, tail `[N]`. One
            of `top_k`; of drawn targets several, with offsets of their own.
        logits: `[N, C]` of a student.
        temperature: of the targets.
        tail_weights: `[C]`; None spreads the tail equally.

    Returns:
        float32 scalars, all but the last two means over the compressions. "kl": mean KL(dense,
        densified) in nats, infinite where a class with a probability was not drawn, or has no tail
        weight. "total_variation": mean of half the sum of absolute differences of probabilities, 0 to
        1, finite always. "loss_difference": mean absolute difference of the examples' losses, relative
        to the mean loss. "gradient_cosine": of the losses' gradients with respect to all logits.
        "gradient_bias" and "gradient_noise": see above; no noise with one compression.
    """
    z = logits.astype(jnp.float32)

    def with_gradient(loss: Callable[[Array], Array]) -> tuple[Array, Array]:
        values, pull_back = jax.vjp(loss, z)
        return values, pull_back(jnp.ones_like(values))[0]

    dense, dense_gradient = with_gradient(
        lambda z: losses.soft_cross_entropy(z, probabilities, temperature)
    )

    def against_dense(one: Kept) -> tuple[dict[str, Array], Array]:
        found, gradient = with_gradient(
            lambda z: losses.top_k_soft_cross_entropy(z, *one, temperature, tail_weights)
        )
        norms = jnp.linalg.norm(gradient) * jnp.linalg.norm(dense_gradient)
        errors = {
            **_distances(probabilities, densify(*one, tail_weights, probabilities.shape[-1])),
            "loss_difference": jnp.mean(jnp.abs(found - dense)) / jnp.mean(dense),
            "gradient_cosine": jnp.sum(gradient * dense_gradient) / norms,
        }
        return errors, gradient - dense_gradient

    every = jax.tree.map(lambda *fields: jnp.stack(fields), *kept)
    errors, differences = jax.lax.map(against_dense, every)
    bias, noise = _bias_and_noise(differences)
    scale = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(dense_gradient), axis=-1)))
    means = jax.tree.map(jnp.mean, errors)
    return {**means, "gradient_bias": bias / scale, "gradient_noise": noise / scale}


def _distances(probabilities: Array, restored: Array) -> dict[str, Array]:
    """The mean divergence and total variation of distributions `[N, C]`, of which one is rounded."""
    restored = restored / jnp.sum(restored, axis=-1, keepdims=True)
    kl = jnp.sum(jax.scipy.special.rel_entr(probabilities, restored), axis=-1)
    variation = 0.5 * jnp.sum(jnp.abs(probabilities - restored), axis=-1)
    return {"kl": jnp.mean(kl), "total_variation": jnp.mean(variation)}


def _bias_and_noise(errors: Array) -> tuple[Array, Array]:
    """The norm of what R draws of N examples' errors `[R, N, C]` have in common, and of the rest."""
    count = len(errors)
    means = jnp.mean(errors, axis=1)
    if count == 1:
        return jnp.linalg.norm(means), jnp.zeros(())
    # The products of all pairs, less those of each with itself.
    products = jnp.sum(jnp.square(jnp.sum(means, axis=0))) - jnp.sum(jnp.square(means))
    shared = products / jnp.float32(count * (count - 1))
    noise = jnp.sum(jnp.var(errors, axis=0, ddof=1), axis=-1)
    return jnp.sqrt(jnp.maximum(shared, 0.0)), jnp.sqrt(jnp.mean(noise))
