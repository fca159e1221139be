"""What training on a compressed form of soft targets changes, against the dense ones."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax import losses, shapes, top_k_losses
from distill_jax.soft_targets.encodings import Kept, densify


def against_dense(
    probabilities: Array,
    kept: Sequence[Kept],
    logits: Array,
    temperature: ArrayLike,
    tail_weights: Array | None,
) -> dict[str, Array]:
    """How far compressed targets, and a student's loss and gradients with them, are from the dense ones.

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

    Raises:
        UserError: for probabilities or logits of another shape.

    Examples:
        >>> from distill_jax.soft_targets import top_k
        >>> probabilities = jnp.array([[0.5, 0.25, 0.125, 0.125]])
        >>> found = against_dense(
        ...     probabilities, [top_k(probabilities, 2)], jnp.zeros((1, 4)), 1.0, None
        ... )
        >>> print(found["kl"], found["gradient_noise"])
        0.0 0.0
    """
    for ids, kept_of, tail in kept:
        shapes.check(
            probabilities=(probabilities, "float N C"),
            logits=(logits, "float N C"),
            tail_weights=(tail_weights, "float? C"),
            ids=(ids, "int N k"),
            kept=(kept_of, "float N k|1"),
            tail=(tail, "float N"),
        )
    return _against_dense(probabilities, kept, logits, temperature, tail_weights)


@jax.jit
def _against_dense(
    probabilities: Array,
    kept: Sequence[Kept],
    logits: Array,
    temperature: ArrayLike,
    tail_weights: Array | None,
) -> dict[str, Array]:
    z, probabilities = logits.astype(jnp.float32), probabilities.astype(jnp.float32)

    def with_gradient(loss: Callable[[Array], Array]) -> tuple[Array, Array]:
        values, pull_back = jax.vjp(loss, z)
        return values, pull_back(jnp.ones_like(values))[0]

    dense, dense_gradient = with_gradient(
        lambda z: losses.soft_cross_entropy(z, probabilities, temperature)
    )

    def measure(one: Kept) -> tuple[dict[str, Array], Array]:
        found, gradient = with_gradient(
            lambda z: top_k_losses.soft_cross_entropy(
                z, *one, temperature, tail_weights=tail_weights
            )
        )
        norms = jnp.linalg.norm(gradient) * jnp.linalg.norm(dense_gradient)
        errors = {
            **_distances(probabilities, densify(*one, tail_weights, probabilities.shape[-1])),
            "loss_difference": jnp.mean(jnp.abs(found - dense)) / jnp.mean(dense),
            "gradient_cosine": jnp.sum(gradient * dense_gradient) / norms,
        }
        return errors, gradient - dense_gradient

    every = jax.tree.map(lambda *fields: jnp.stack(fields), *kept)
    errors, differences = jax.lax.map(measure, every)
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
