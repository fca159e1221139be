r"""The paper's losses as pure functions of logits, one value per example.

Shapes: logits and soft targets are `[..., C]`, labels `[...]`, results `[...]` float32. Sums are
accumulated in float32 for every input dtype, bfloat16 too. Probabilities of exactly 0 and logits of
+-1e4 give finite values and gradients. To exclude a class, give it a logit of -inf and a soft target of
0. Soft targets are constants: no gradient flows into the teacher.

`temperature` and `hard_weight` may be traced scalars, so that one program can train a sweep of them.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (the paper).
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike


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
    return jax.nn.softmax(logits.astype(jnp.float32) / temperature)


def log_softmax(logits: Array, temperature: ArrayLike = 1.0) -> Array:
    """The logarithm of `softmax`, computed in log space; same arguments and shapes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> print(losses.log_softmax(jnp.array([4.0, 2.0, 0.0])))
        [-0.143 -2.143 -4.143]
    """
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
    targets = jax.lax.stop_gradient(soft_targets.astype(jnp.float32))
    return -jnp.square(temperature) * _expected_log(targets, log_softmax(logits, temperature))


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
    targets = jax.lax.stop_gradient(soft_targets.astype(jnp.float32))
    entropy = -jnp.sum(jax.scipy.special.xlogy(targets, targets), axis=-1)
    return soft_cross_entropy(logits, targets, temperature) - jnp.square(temperature) * entropy


def hard_cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy with the correct labels at temperature 1.

    Args:
        logits: `[..., C]`.
        labels: int `[...]`, in 0..C-1.

    Returns:
        `[...]` float32, in nats.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> logits = jnp.array([[4.0, 2.0, 0.0], [4.0, 2.0, 0.0]])
        >>> print(losses.hard_cross_entropy(logits, jnp.array([0, 1])))
        [0.143 2.143]
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def distillation(
    logits: Array,
    soft_targets: Array,
    labels: Array,
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
        labels: int `[...]`; ignored (any value) where `label_known` is false.
        temperature: scalar above 0.
        hard_weight: scalar in 0..1; the paper found a considerably lower weight on labels best.
        label_known: bool `[...]`; None means that all labels are known.

    Returns:
        `[...]` float32.

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
    return _with_labels(soft, logits, labels, hard_weight, label_known)


def top_k_soft_cross_entropy(
    logits: Array,
    ids: Array,
    probabilities: Array,
    tail: Array,
    temperature: ArrayLike,
    *,
    tail_weights: Array | None = None,
) -> Array:
    """`soft_cross_entropy` with soft targets for k classes and one sum for all other classes.

    `T^2 * -(sum_j p_j log q_{id_j} + tail * sum_i s_i log q_i)` with `s = tail_distribution(...)`.
    Value and gradient are those of the dense targets (`soft_targets.densify`), which are not built. The
    k classes may be the most probable ones or random draws.

    Args:
        logits: `[..., C]` of the student.
        ids: integer `[..., k]`; the probabilities of a class that occurs several times are added.
        probabilities: `[..., k]` of these classes, or `[..., 1]` for all k, produced at the same
            temperature.
        tail: `[...]`, the probability of all other classes together; it has no effect if k = C.
        temperature: scalar above 0.
        tail_weights: `[C]`, see `tail_distribution`.

    Returns:
        `[...]` float32, in nats times T^2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> logits = jnp.array([[3.0, 1.0, 1.0, 0.0]])
        >>> ids, probabilities = jnp.array([[0, 1]]), jnp.array([[0.7, 0.2]])
        >>> tail = jnp.array([0.1])
        >>> print(losses.top_k_soft_cross_entropy(logits, ids, probabilities, tail, 1.0))
        [0.928]
        >>> dense = jnp.array([[0.7, 0.2, 0.05, 0.05]])
        >>> print(losses.soft_cross_entropy(logits, dense, 1.0))
        [0.928]
    """
    log_q = log_softmax(logits, temperature)
    named = jax.lax.stop_gradient(probabilities.astype(jnp.float32))
    log_q_named = jnp.take_along_axis(log_q, ids.astype(jnp.int32), axis=-1)
    spread = tail_distribution(ids, logits.shape[-1], tail_weights)
    # Multiplied first: without a tail, a class left out by -inf has no part in the sum.
    rest = jax.lax.stop_gradient(tail.astype(jnp.float32))[..., None] * spread
    expected = _expected_log(named, log_q_named) + _expected_log(rest, log_q)
    return -jnp.square(temperature) * expected


def top_k_distillation(
    logits: Array,
    ids: Array,
    probabilities: Array,
    tail: Array,
    labels: Array,
    *,
    temperature: ArrayLike,
    hard_weight: ArrayLike = 0.0,
    label_known: Array | None = None,
    tail_weights: Array | None = None,
) -> Array:
    """`distillation` with soft targets for k classes.

    Args:
        logits, ids, probabilities, tail, temperature, tail_weights: as for `top_k_soft_cross_entropy`.
        labels, hard_weight, label_known: as for `distillation`.

    Returns:
        `[...]` float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> logits = jnp.array([[3.0, 1.0, 1.0, 0.0]])
        >>> ids, probabilities = jnp.array([[0, 1]]), jnp.array([[0.7, 0.2]])
        >>> loss = losses.top_k_distillation(
        ...     logits, ids, probabilities, jnp.array([0.1]), jnp.array([0]), temperature=1.0,
        ...     hard_weight=0.5,
        ... )
        >>> print(loss)
        [0.603]
    """
    soft = top_k_soft_cross_entropy(
        logits, ids, probabilities, tail, temperature, tail_weights=tail_weights
    )
    return _with_labels(soft, logits, labels, hard_weight, label_known)


def tail_distribution(ids: Array, num_classes: int, tail_weights: Array | None = None) -> Array:
    """How the other classes share the probability that an example's k classes do not have.

    They share it in proportion to `tail_weights`; the k classes get 0. The weights of the other classes
    are summed directly: their sum as a difference would be lost to rounding where the k have most of it.

    Args:
        ids: integer `[..., k]`.
        num_classes: C.
        tail_weights: `[C]`, at least 0 and with any sum, such as the teacher's mean distribution; None
            for equal shares.

    Returns:
        `[..., C]` float32 with sum 1; all 0 where no other class has a weight (k = C).

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> print(losses.tail_distribution(jnp.array([0, 3]), num_classes=4))
        [0. 0.5 0.5 0. ]
    """
    weights = jnp.ones(num_classes) if tail_weights is None else tail_weights
    weights = jnp.broadcast_to(weights, (*ids.shape[:-1], num_classes)).astype(jnp.float32)
    # Vectorised over examples, so that XLA sees that it needs no ids of other devices.
    other_than = jnp.vectorize(
        lambda k: jnp.ones(num_classes, bool).at[k].set(False), signature="(k)->(c)"
    )
    weights = jax.lax.stop_gradient(jnp.where(other_than(ids.astype(jnp.int32)), weights, 0.0))
    remaining = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(remaining > 0, remaining, 1.0)


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
        labels: int `[...]`; ignored where `label_known` is false.
        weight: scalar in 0..1.
        label_known: bool `[...]`; None means that all labels are known.

    Returns:
        `[..., C]` float32 probabilities.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import losses
        >>> print(losses.label_modified(jnp.array([0.6, 0.3, 0.1]), jnp.array(1), 0.5))
        [0.3 0.65 0.05]
    """
    targets, weight = soft_targets.astype(jnp.float32), jnp.asarray(weight, jnp.float32)
    mixed = (1.0 - weight) * targets + weight * jax.nn.one_hot(labels, targets.shape[-1])
    return mixed if label_known is None else jnp.where(label_known[..., None], mixed, targets)


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
    z = logits.astype(jnp.float32)
    v = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
    kept = jnp.isfinite(z) & jnp.isfinite(v)
    difference = jnp.where(kept, z, 0.0) - jnp.where(kept, v, 0.0)
    if zero_mean:
        count = jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.float32)
        mean = jnp.sum(difference, axis=-1, keepdims=True) / count
        difference = jnp.where(kept, difference - mean, 0.0)
    return 0.5 * jnp.sum(jnp.square(difference), axis=-1)


def _with_labels(
    soft: Array,
    logits: Array,
    labels: Array,
    hard_weight: ArrayLike,
    label_known: Array | None,
) -> Array:
    """The weighted average of a soft objective `[...]` and the cross-entropy with the labels."""
    hard_weight = jnp.asarray(hard_weight, jnp.float32)
    known = jnp.ones(labels.shape, bool) if label_known is None else label_known
    # `where`, not a product: the loss of a class that is left out is inf, and 0 * inf is NaN.
    weight = jnp.where(known, hard_weight, 0.0)
    hard = hard_cross_entropy(logits, jnp.where(known, labels, 0))
    return (1.0 - hard_weight) * soft + jnp.where(weight > 0, weight * hard, 0.0)


def _expected_log(probabilities: Array, log_q: Array) -> Array:
    """`sum_i p_i log q_i` where 0 * -inf counts as 0, in the gradient too."""
    return jnp.sum(probabilities * jnp.where(probabilities > 0, log_q, 0.0), axis=-1)
