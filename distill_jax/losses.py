r"""The paper's losses as pure functions of logits, one value per example.

Shapes: logits and soft targets are `[..., C]`, labels `[...]`, results `[...]` float32. Sums are
accumulated in float32 for every input dtype, bfloat16 too. Probabilities of exactly 0 and logits of
+-1e4 give finite values and gradients. To exclude a class, give it a logit of -inf and a soft target of
0. Soft targets are constants: no gradient flows into the teacher.

A label below 0 is unknown, and has no part. A label of C or more is a mistake: the loss and its gradient
are NaN, since compiled code can't raise an error.

`temperature` and `hard_weight` may be traced scalars, so that one program can train a sweep of them. As
plain numbers they are checked: a temperature of 0 or less or a weight outside 0..1 is a UserError.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (the paper).
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from distill_jax import ranges, shapes


def softmax(logits: Array, temperature: ArrayLike = 1.0) -> Array:
    """Class probabilities at a temperature, Eq. 1: `exp(z_i / T) / sum_j exp(z_j / T)`.

    Args:
        logits: `[..., C]`.
        temperature: T, scalar above 0; a higher one gives softer probabilities.

    Returns:
        `[..., C]` float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> logits = jnp.array([4.0, 2.0, 0.0])
        >>> print(losses.softmax(logits))
        [0.867 0.117 0.016]
        >>> print(losses.softmax(logits, temperature=4.0))
        [0.506 0.307 0.186]
    """
    shapes.check(logits=(logits, "number ... C"))
    ranges.check_plain(temperature=temperature)
    return jax.nn.softmax(logits.astype(jnp.float32) / temperature)


def log_softmax(logits: Array, temperature: ArrayLike = 1.0) -> Array:
    """The logarithm of `softmax`, computed in log space; same arguments and shapes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> print(losses.log_softmax(jnp.array([4.0, 2.0, 0.0])))
        [-0.143 -2.143 -4.143]
    """
    shapes.check(logits=(logits, "number ... C"))
    ranges.check_plain(temperature=temperature)
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)


def soft_cross_entropy(logits: Array, soft_targets: Array, temperature: ArrayLike) -> Array:
    """Cross-entropy with soft targets at a temperature, times its square (section 2).

    `T^2 * -sum_i p_i log q_i` with `q = softmax(z / T)`. The gradient of the cross-entropy is
    `(q - p) / T` (Eq. 2), which shrinks as 1/T^2; the factor T^2 makes up for that.

    Args:
        logits: `[..., C]` of the student.
        soft_targets: `[..., C]` probabilities, produced at the same temperature.
        temperature: scalar above 0.

    Returns:
        `[...]` float32, in nats times T^2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> soft_targets = losses.softmax(jnp.array([[4.0, 2.0, 0.0]]), temperature=2.0)
        >>> logits = jnp.array([[3.0, 1.0, 1.0]])
        >>> print(losses.soft_cross_entropy(logits, soft_targets, temperature=2.0))
        [3.545]
    """
    shapes.check(logits=(logits, "number ... C"), soft_targets=(soft_targets, "number ... C"))
    targets = jax.lax.stop_gradient(soft_targets.astype(jnp.float32))
    return -jnp.square(temperature) * expected_log(targets, log_softmax(logits, temperature))


def soft_kl(logits: Array, soft_targets: Array, temperature: ArrayLike) -> Array:
    """KL(p, q) times T^2: `soft_cross_entropy` minus T^2 times the entropy of the targets.

    It is 0 where student and teacher agree. Same gradient, arguments and shapes as `soft_cross_entropy`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> logits = jnp.array([4.0, 2.0, 0.0])
        >>> kl = losses.soft_kl(logits, losses.softmax(logits, 2.0), temperature=2.0)
        >>> print(jnp.abs(kl) < 1e-5)
        True
    """
    shapes.check(logits=(logits, "number ... C"), soft_targets=(soft_targets, "number ... C"))
    targets = jax.lax.stop_gradient(soft_targets.astype(jnp.float32))
    entropy = -jnp.sum(jax.scipy.special.xlogy(targets, targets), axis=-1)
    return soft_cross_entropy(logits, targets, temperature) - jnp.square(temperature) * entropy


def hard_cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy with the correct labels at temperature 1; 0 where a label is unknown.

    Args:
        logits: `[..., C]`.
        labels: int `[...]`, in 0..C-1, or below 0 where unknown.

    Returns:
        `[...]` float32, in nats; NaN for a label of C or more.

    Raises:
        UserError: for labels of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> logits = jnp.array([[4.0, 2.0, 0.0], [4.0, 2.0, 0.0]])
        >>> print(losses.hard_cross_entropy(logits, jnp.array([0, 1])))
        [0.143 2.143]
        >>> print(losses.hard_cross_entropy(logits, jnp.array([-1, 3])))
        [ 0. nan]
    """
    shapes.check(logits=(logits, "number ... C"), labels=(labels, "int ..."))
    known = labels >= 0
    values = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(known, labels, 0)
    )
    return jnp.where(known, values * valid(labels, logits.shape[-1]), 0.0)


def distillation(
    logits: Array,
    soft_targets: Array,
    labels: Array | None,
    temperature: ArrayLike,
    hard_weight: ArrayLike = 0.0,
    *,
    label_known: Array | None = None,
) -> Array:
    """The weighted average of the two objectives of section 2.

    `(1 - hard_weight) * T^2 * CE(p, softmax(z / T)) + hard_weight * CE(label, softmax(z))`.
    An example whose label is unknown has only the first term, with the same weight.

    Args:
        logits: `[..., C]` of the student; both terms use the same logits.
        soft_targets: `[..., C]` probabilities at `temperature`.
        labels: int `[...]`, below 0 where unknown; None: all are unknown.
        temperature: scalar above 0.
        hard_weight: scalar in 0..1; the paper found a considerably lower weight on labels best.
        label_known: bool `[...]`; where it is false, a label counts as unknown, whatever its value.

    Returns:
        `[...]` float32; NaN for a known label of C or more.

    Raises:
        UserError: for labels of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> teacher_logits = jnp.array([[4.0, 2.0, 0.0]])
        >>> student_logits = jnp.array([[3.0, 1.0, 1.0]])
        >>> soft_targets = losses.softmax(teacher_logits, 2.0)
        >>> loss = losses.distillation(
        ...     student_logits, soft_targets, jnp.array([0]), temperature=2.0, hard_weight=0.1
        ... )
        >>> print(loss)
        [3.214]
    """
    soft = soft_cross_entropy(logits, soft_targets, temperature)
    return with_labels(soft, logits, labels, hard_weight, label_known)


def label_modified(
    soft_targets: Array,
    labels: Array,
    weight: ArrayLike,
    label_known: Array | None = None,
) -> Array:
    """Soft targets modified by the correct labels: `(1 - weight) * p + weight * onehot(label)`.

    Section 2 mentions this alternative, and found that two weighted objectives work better.

    Args:
        soft_targets: `[..., C]` probabilities.
        labels: int `[...]`; where one is below 0, unknown, the soft targets stay as they are.
        weight: scalar in 0..1.
        label_known: as for `distillation`.

    Returns:
        `[..., C]` float32 probabilities; NaN for a known label of C or more.

    Raises:
        UserError: for labels of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> print(losses.label_modified(jnp.array([0.6, 0.3, 0.1]), jnp.array(1), 0.5))
        [0.3 0.65 0.05]
    """
    shapes.check(
        soft_targets=(soft_targets, "number ... C"),
        labels=(labels, "int ..."),
        label_known=(label_known, "bool? ..."),
    )
    if isinstance(weight, int | float):
        ranges.check_value("weight", weight, ranges.share())
    targets, weight = soft_targets.astype(jnp.float32), jnp.asarray(weight, jnp.float32)
    labels = _known_labels(labels, label_known)
    mixed = (1.0 - weight) * targets + weight * jax.nn.one_hot(labels, targets.shape[-1])
    return jnp.where(
        (labels >= 0)[..., None], mixed * valid(labels, targets.shape[-1])[..., None], targets
    )


def logit_matching(logits: Array, teacher_logits: Array, zero_mean: bool = False) -> Array:
    """Half the squared difference of logits, summed over classes (Bucila et al. 2006; section 2.1).

    `1/2 sum_i (z_i - v_i)^2`. With `zero_mean` the logits of each example are centred first. That is
    the limit of distillation at a high temperature: Eq. 4 is the gradient of this loss over `N T^2`.

    Args:
        logits: `[..., C]` of the student.
        teacher_logits: `[..., C]`; a class that is -inf on either side is left out.
        zero_mean: subtract each example's mean over the classes that are kept.

    Returns:
        `[...]` float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> student, teacher = jnp.array([3.0, 1.0, 1.0]), jnp.array([4.0, 2.0, 0.0])
        >>> print(losses.logit_matching(student, teacher))
        1.5
        >>> print(f"{losses.logit_matching(student, teacher, zero_mean=True):.3f}")
        1.333
    """
    shapes.check(logits=(logits, "number ... C"), teacher_logits=(teacher_logits, "number ... C"))
    z = logits.astype(jnp.float32)
    v = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
    kept = jnp.isfinite(z) & jnp.isfinite(v)
    difference = jnp.where(kept, z, 0.0) - jnp.where(kept, v, 0.0)
    if zero_mean:
        count = jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.float32)
        mean = jnp.sum(difference, axis=-1, keepdims=True) / count
        difference = jnp.where(kept, difference - mean, 0.0)
    return 0.5 * jnp.sum(jnp.square(difference), axis=-1)


def with_labels(
    soft: Array,
    logits: Array,
    labels: Array | None,
    hard_weight: ArrayLike,
    label_known: Array | None = None,
) -> Array:
    """The weighted average of a soft objective and the cross-entropy with the labels.

    `(1 - hard_weight) * soft + hard_weight * CE(label, softmax(z))`; the first term alone where a label
    is unknown.

    Args:
        soft: float `[...]`, such as a value of `later_losses`.
        logits: `[..., C]` of the student.
        labels, hard_weight, label_known: as for `distillation`.

    Returns:
        `[...]` float32; NaN for a known label of C or more.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> logits = jnp.array([[4.0, 2.0, 0.0], [4.0, 2.0, 0.0]])
        >>> print(losses.with_labels(jnp.ones(2), logits, jnp.array([0, -1]), 0.5))
        [0.571 0.5 ]
    """
    shapes.check(
        logits=(logits, "number ... C"),
        soft=(soft, "float ..."),
        labels=(labels, "int? ..."),
        label_known=(label_known, "bool? ..."),
    )
    ranges.check_plain(hard_weight=hard_weight)
    hard_weight = jnp.asarray(hard_weight, jnp.float32)
    soft = (1.0 - hard_weight) * soft.astype(jnp.float32)
    if labels is None:
        return soft
    labels = _known_labels(labels, label_known)
    hard = hard_cross_entropy(logits, labels)
    # `where`, not a product: the loss of a class that is left out is inf, and 0 * inf is NaN.
    return soft + jnp.where((labels >= 0) & (hard_weight > 0), hard_weight * hard, 0.0)


def _known_labels(labels: Array, label_known: Array | None) -> Array:
    return labels if label_known is None else jnp.where(label_known, labels.astype(jnp.int32), -1)


def valid(labels: Array, num_classes: int) -> Array:
    """1 for a label below C, else NaN: a factor, so that the gradient becomes NaN too.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> print(losses.valid(jnp.array([-1, 2, 3]), num_classes=3))
        [ 1.  1. nan]
    """
    return jnp.where(labels < num_classes, 1.0, jnp.nan)


def expected_log(probabilities: Array, log_q: Array) -> Array:
    """`sum_i p_i log q_i` where 0 * -inf counts as 0, in the gradient too; NaN where a p_i is.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> print(losses.expected_log(jnp.array([1.0, 0.0]), jnp.array([-2.0, -jnp.inf])))
        -2.0
    """
    return jnp.sum(probabilities * jnp.where(probabilities == 0, 0.0, log_q), axis=-1)
