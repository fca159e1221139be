"""The paper's losses with soft targets of k classes and one sum for all others (`soft_targets.top_k`).

Contracts are those of `losses`. Values and gradients are those of the dense targets, which are not
built.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax import losses, shapes


def soft_cross_entropy(
    logits: Array,
    ids: Array,
    probabilities: Array,
    tail: Array,
    temperature: ArrayLike,
    *,
    tail_weights: Array | None = None,
) -> Array:
    """`losses.soft_cross_entropy` with soft targets for k classes and one sum for all other classes.

    `T^2 * -(sum_j p_j log q_{id_j} + tail * sum_i s_i log q_i)` with `s = tail_distribution(...)`.
    Value and gradient are those of the dense targets (`soft_targets.densify`), which are not built. The
    k classes may be the most probable ones or random draws.

    Args:
        logits: `[..., C]` of the student.
        ids: integer `[..., k]`; the probabilities of a class that occurs several times are added. An id
            below 0 is padding, and its probability must be 0.
        probabilities: `[..., k]` of these classes, or `[..., 1]` for all k, produced at the same
            temperature.
        tail: `[...]`, the probability of all other classes together; it has no effect if k = C.
        temperature: scalar above 0.
        tail_weights: `[C]`, see `tail_distribution`.

    Returns:
        `[...]` float32, in nats times T^2; NaN for an id of C or more, or padding with a probability.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses, top_k_losses
        >>> logits = jnp.array([[3.0, 1.0, 1.0, 0.0]])
        >>> ids, probabilities = jnp.array([[0, 1]]), jnp.array([[0.7, 0.2]])
        >>> tail = jnp.array([0.1])
        >>> print(top_k_losses.soft_cross_entropy(logits, ids, probabilities, tail, 1.0))
        [0.928]
        >>> dense = jnp.array([[0.7, 0.2, 0.05, 0.05]])
        >>> print(losses.soft_cross_entropy(logits, dense, 1.0))
        [0.928]
    """
    shapes.check(
        logits=(logits, "number ... C"),
        ids=(ids, "int ... k"),
        probabilities=(probabilities, "float ... k|1"),
        tail=(tail, "float ..."),
        tail_weights=(tail_weights, "float? C"),
    )
    log_q = losses.log_softmax(logits, temperature)
    ids, named = named_classes(ids, probabilities)
    named = jax.lax.stop_gradient(named)
    log_q_named = jnp.take_along_axis(log_q, jnp.maximum(ids, 0), axis=-1)
    spread = tail_distribution(ids, logits.shape[-1], tail_weights)
    # Multiplied first: without a tail, a class left out by -inf has no part in the sum.
    rest = jax.lax.stop_gradient(tail.astype(jnp.float32))[..., None] * spread
    expected = losses.expected_log(named, log_q_named) + losses.expected_log(rest, log_q)
    return -jnp.square(temperature) * expected


def distillation(
    logits: Array,
    ids: Array,
    probabilities: Array,
    tail: Array,
    labels: Array | None,
    *,
    temperature: ArrayLike,
    hard_weight: ArrayLike = 0.0,
    label_known: Array | None = None,
    tail_weights: Array | None = None,
) -> Array:
    """`losses.distillation` with soft targets for k classes.

    Args:
        logits, ids, probabilities, tail, temperature, tail_weights: as for `soft_cross_entropy`.
        labels, hard_weight, label_known: as for `losses.distillation`.

    Returns:
        `[...]` float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses, top_k_losses
        >>> logits = jnp.array([[3.0, 1.0, 1.0, 0.0]])
        >>> ids, probabilities = jnp.array([[0, 1]]), jnp.array([[0.7, 0.2]])
        >>> loss = top_k_losses.distillation(
        ...     logits, ids, probabilities, jnp.array([0.1]), jnp.array([0]), temperature=1.0,
        ...     hard_weight=0.5,
        ... )
        >>> print(loss)
        [0.603]
    """
    soft = soft_cross_entropy(
        logits, ids, probabilities, tail, temperature, tail_weights=tail_weights
    )
    return losses.with_labels(soft, logits, labels, hard_weight, label_known)


def named_classes(ids: Array, probabilities: Array) -> tuple[Array, Array]:
    """The k classes of each example as int32 `[..., k]` and their probabilities as float32 `[..., k]`.

    An id below 0 is padding: -1 and 0. One that has a probability is a mistake, which becomes NaN.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses, top_k_losses
        >>> ids, named = top_k_losses.named_classes(jnp.array([2, -7]), jnp.array([0.5, 0.0]))
        >>> print(ids, named)
        [ 2 -1] [0.5 0. ]
    """
    ids = jnp.maximum(ids.astype(jnp.int32), -1)
    named = jnp.broadcast_to(probabilities.astype(jnp.float32), ids.shape)
    return ids, jnp.where((ids >= 0) | (named == 0), named, jnp.nan)


def tail_distribution(ids: Array, num_classes: int, tail_weights: Array | None = None) -> Array:
    """How the other classes share the probability that an example's k classes do not have.

    They share it in proportion to `tail_weights`; the k classes get 0. The weights of the other classes
    are summed directly: their sum as a difference would be lost to rounding where the k have most of it.

    Args:
        ids: integer `[..., k]`; those below 0 are padding.
        num_classes: C.
        tail_weights: `[C]`, at least 0 and with any sum, such as the teacher's mean distribution; None
            for equal shares.

    Returns:
        `[..., C]` float32 with sum 1; all 0 where no other class has a weight (k = C), NaN for an id of
        C or more.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses, top_k_losses
        >>> print(top_k_losses.tail_distribution(jnp.array([0, 3]), num_classes=4))
        [0. 0.5 0.5 0. ]
    """
    shapes.check(ids=(ids, "int ... k"), tail_weights=(tail_weights, f"float? {num_classes}"))
    weights = jnp.ones(num_classes) if tail_weights is None else tail_weights
    weights = jnp.broadcast_to(weights, (*ids.shape[:-1], num_classes)).astype(jnp.float32)
    # Vectorised over examples, so that XLA sees that it needs no ids of other devices.
    other_than = jnp.vectorize(
        lambda k: jnp.ones(num_classes, bool).at[k].set(False, mode="drop"), signature="(k)->(c)"
    )
    ids = ids.astype(jnp.int32)
    beyond = jnp.any(ids >= num_classes, axis=-1, keepdims=True)
    others = other_than(jnp.where(ids >= 0, ids, num_classes))  # a negative index would wrap
    weights = jax.lax.stop_gradient(jnp.where(others, weights, 0.0))
    remaining = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(beyond, jnp.nan, jnp.where(remaining > 0, remaining, 1.0))
