"""Losses of examples that may have several classes at once: one yes or no for each class.

Each class has a sigmoid, and so a probability of its own. Logits are `[..., C]`, labels int `[..., C]`:
1 yes, 0 no, below 0 unknown, an entry that has no part. Values are `[...]` float32, summed over classes:
as these are independent, that is the cross-entropy of all labels of an example together, as
`losses.hard_cross_entropy` is that of its one label. The other contracts are those of `losses`.

In a step the labels are a field of their own, "labels" `[B, C]` (`step_losses.multi_label_loss`,
`metrics.multi_label_counts`, `trainer.MULTI_LABEL`).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax import ranges, shapes


def sigmoid(logits: Array, temperature: ArrayLike = 1.0) -> Array:
    """Each class's probability at a temperature, `1 / (1 + exp(-z / T))`.

    Args:
        logits: `[..., C]`.
        temperature: scalar above 0; a higher one moves probabilities towards a half.

    Returns:
        `[..., C]` float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import multi_label
        >>> print(multi_label.sigmoid(jnp.array([4.0, 0.0, -2.0]), temperature=2.0))
        [0.881 0.5   0.269]
    """
    shapes.check(logits=(logits, "number ... C"))
    ranges.check_plain(temperature=temperature)
    return jax.nn.sigmoid(logits.astype(jnp.float32) / temperature)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy with the labels at temperature 1, summed over the classes whose label is known.

    Args:
        logits: `[..., C]`; a class left out by -inf must be a no, or unknown.
        labels: int `[..., C]`.

    Returns:
        `[...]` float32, in nats; NaN if a label is 2 or more.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import multi_label
        >>> logits = jnp.array([[4.0, 0.0, -2.0], [4.0, 0.0, -2.0]])
        >>> print(multi_label.cross_entropy(logits, jnp.array([[1, 0, 0], [1, -1, 0]])))
        [0.838 0.145]
    """
    shapes.check(logits=(logits, "number ... C"), labels=(labels, "int ... C"))
    targets = jnp.where(labels < 2, labels.astype(jnp.float32), jnp.nan)
    terms = _binary(logits.astype(jnp.float32), jnp.maximum(targets, 0.0))
    return jnp.sum(jnp.where(labels < 0, 0.0, terms), axis=-1)


def distillation(
    logits: Array,
    soft_targets: Array,
    labels: Array | None,
    temperature: ArrayLike,
    hard_weight: ArrayLike = 0.0,
) -> Array:
    """The paper's objective with a sigmoid for each class in the softmax's place.

    `(1 - hard_weight) * T^2 * sum_c CE(p_c, sigmoid(z_c / T)) + hard_weight * sum_c CE(label_c,
    sigmoid(z_c))`. The gradient of the first term is `T (sigmoid(z / T) - p)` for each class: at a high
    temperature `(z - v) / 4`, of the same size at all T, as with a softmax. Where a label is unknown,
    its class has the first term alone.

    Args:
        logits: `[..., C]` of the student.
        soft_targets: `[..., C]` probabilities of the teacher, `sigmoid(v, T)`; a class left out by a
            logit of -inf must have 0.
        labels: int `[..., C]`; None: all are unknown.
        temperature: scalar above 0.
        hard_weight: scalar in 0..1.

    Returns:
        `[...]` float32; NaN if a label is 2 or more.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import multi_label
        >>> soft_targets = multi_label.sigmoid(jnp.array([[4.0, 0.0, -2.0]]), temperature=2.0)
        >>> logits, labels = jnp.array([[3.0, 1.0, -1.0]]), jnp.array([[1, 0, 0]])
        >>> print(multi_label.distillation(logits, soft_targets, labels, 2.0, hard_weight=0.1))
        [6.334]
    """
    shapes.check(
        logits=(logits, "number ... C"),
        soft_targets=(soft_targets, "float ... C"),
        labels=(labels, "int? ... C"),
    )
    ranges.check_plain(temperature=temperature, hard_weight=hard_weight)
    targets = jax.lax.stop_gradient(soft_targets.astype(jnp.float32))
    terms = _binary(logits.astype(jnp.float32) / temperature, targets)
    weight = jnp.asarray(hard_weight, jnp.float32)
    soft = (1.0 - weight) * jnp.square(temperature) * jnp.sum(terms, axis=-1)
    if labels is None:
        return soft
    return soft + jnp.where(weight > 0, weight * cross_entropy(logits, labels), 0.0)


def _binary(logits: Array, targets: Array) -> Array:
    """`-p log sigmoid(z) - (1 - p) log sigmoid(-z)`, where 0 times an infinity is 0."""
    yes = jnp.where(targets == 0, 0.0, jax.nn.log_sigmoid(logits))
    no = jnp.where(targets == 1, 0.0, jax.nn.log_sigmoid(-logits))
    return -targets * yes - (1.0 - targets) * no
