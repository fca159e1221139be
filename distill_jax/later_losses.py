"""Losses of later papers as pure functions of two nets' logits, one value per example.

Shapes, dtypes and contracts are those of `losses`: logits `[..., C]`, results `[...]` float32, no
gradient into the teacher, traced temperatures. A class is left out by a logit of -inf on both sides.
They take the teacher's logits v and not its probabilities, because they need the logarithms of these: of
an ensemble those that `soft_targets.ensemble_logits` makes. None has a term of labels;
`losses.with_labels` adds it.

With `p = softmax(v / T)` of the teacher and `q = softmax(z / T)` of the student:

    reverse_kl           T^2 KL(q, p)
    jensen_shannon       T^2 (b KL(p, m) + (1 - b) KL(q, m)), with the mixture m = b p + (1 - b) q
    decoupled            KL of "the label or not", and KL among the other classes, weighted apart
    standardised_kl      T^2 KL(p, q) of logits with mean 0 and standard deviation 1
    transformed_teacher  KL(p, softmax(z)) times sum_i softmax(v)_i^(1/T)
    correlation          1 less the correlations of p and q, over the classes and over the batch
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax import losses, ranges, shapes

_ADDED = 1e-8  # to variances and products of norms, so that nothing is divided by 0


def reverse_kl(logits: Array, teacher_logits: Array, temperature: ArrayLike) -> Array:
    """KL(q, p) times T^2: the student avoids what the teacher finds unlikely.

    A small student that can't follow all of the teacher keeps to some of its classes, where KL(p, q)
    makes it spread over all. The factor T^2 has the same reason as in `losses.soft_cross_entropy`.

    Source: Gu et al., "MiniLLM", 2024; Agarwal et al., "On-policy distillation of language models:
    learning from self-generated mistakes" (GKD), 2024.

    Args:
        logits: `[..., C]` of the student.
        teacher_logits: `[..., C]`.
        temperature: scalar above 0.

    Returns:
        `[...]` float32, in nats times T^2; infinite where the teacher alone leaves out a class.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import later_losses
        >>> student, teacher = jnp.array([3.0, 1.0, 1.0]), jnp.array([4.0, 2.0, 0.0])
        >>> print(f"{later_losses.reverse_kl(student, teacher, temperature=2.0):.3f}")
        0.272
    """
    log_p, log_q = _log_probs(logits, teacher_logits, temperature)
    return jnp.square(temperature) * _kl(log_q, log_p)


def jensen_shannon(
    logits: Array, teacher_logits: Array, temperature: ArrayLike, teacher_share: ArrayLike = 0.5
) -> Array:
    """The generalised Jensen-Shannon divergence times T^2, between `soft_kl` and `reverse_kl`.

    `T^2 (b KL(p, m) + (1 - b) KL(q, m))` with `m = b p + (1 - b) q`. It is finite always. Divided by b
    its limit is KL(p, q) for b to 0, divided by 1 - b it is KL(q, p) for b to 1.

    Source: Agarwal et al., "On-policy distillation of language models: learning from self-generated
    mistakes" (GKD), 2024, section 3.

    Args:
        logits: `[..., C]` of the student.
        teacher_logits: `[..., C]`.
        temperature: scalar above 0.
        teacher_share: b, scalar in 0..1, the teacher's share of the mixture (beta in the paper); at 0
            and 1 the loss is 0.

    Returns:
        `[...]` float32, in nats times T^2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import later_losses
        >>> student, teacher = jnp.array([3.0, 1.0, 1.0]), jnp.array([4.0, 2.0, 0.0])
        >>> print(f"{later_losses.jensen_shannon(student, teacher, temperature=2.0):.3f}")
        0.059
    """
    ranges.check_plain(teacher_share=teacher_share)
    share = jnp.asarray(teacher_share, jnp.float32)
    log_p, log_q = _log_probs(logits, teacher_logits, temperature)
    mixture = share * jnp.exp(log_p) + (1.0 - share) * jnp.exp(log_q)
    log_m = jnp.log(jnp.where(mixture > 0, mixture, 1.0))  # of 0 it has no gradient, and no part
    divergence = share * _kl(log_p, log_m) + (1.0 - share) * _kl(log_q, log_m)
    return jnp.square(temperature) * divergence


def decoupled(
    logits: Array,
    teacher_logits: Array,
    labels: Array,
    temperature: ArrayLike,
    *,
    target_weight: ArrayLike = 1.0,
    other_weight: ArrayLike = 8.0,
) -> Array:
    """KL(p, q) in two parts that are weighted apart, times T^2.

    `T^2 (target_weight * TCKD + other_weight * NCKD)`. TCKD is the divergence of the two probabilities
    "the label" and "not the label"; NCKD the divergence among the other classes, whose probabilities are
    renormalised. KL(p, q) itself is `TCKD + (1 - p_label) NCKD`: it hardly counts what a confident
    teacher says of the other classes.

    Source: Zhao et al., "Decoupled knowledge distillation", 2022.

    Args:
        logits: `[..., C]` of the student.
        teacher_logits: `[..., C]`.
        labels: int `[...]`; where one is below 0, unknown, the value is that of `losses.soft_kl`.
        temperature: scalar above 0.
        target_weight: of TCKD (alpha in the paper).
        other_weight: of NCKD (beta in the paper).

    Returns:
        `[...]` float32, in nats times T^2; NaN for a label of C or more.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import later_losses
        >>> student, teacher = jnp.array([[3.0, 1.0, 1.0]]), jnp.array([[4.0, 2.0, 0.0]])
        >>> print(later_losses.decoupled(student, teacher, jnp.array([0]), temperature=2.0))
        [3.617]
    """
    shapes.check(logits=(logits, "number ... C"), labels=(labels, "int ..."))
    ranges.check_plain(target_weight=target_weight, other_weight=other_weight)
    classes = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    target = classes.reshape((1,) * labels.ndim + (-1,)) == labels.astype(jnp.int32)[..., None]

    def split(log_probs: Array) -> tuple[Array, Array]:
        """The logarithms of "the label" and "not the label", and those among the others."""
        others = jnp.where(target, -jnp.inf, log_probs)
        both = [
            jnp.sum(jnp.where(target, log_probs, 0.0), axis=-1),
            jax.nn.logsumexp(others, axis=-1),
        ]
        none = jnp.all(jnp.isneginf(others), axis=-1, keepdims=True)
        return jnp.stack(both, axis=-1), jax.nn.log_softmax(jnp.where(none, 0.0, others))

    log_p, log_q = _log_probs(logits, teacher_logits, temperature)
    (both_p, others_p), (both_q, others_q) = split(log_p), split(log_q)
    known = labels >= 0
    # Where there is no label, "the others" are all classes.
    parts = jnp.where(known, target_weight * _kl(both_p, both_q), 0.0)
    parts += jnp.where(known, other_weight, 1.0) * _kl(others_p, others_q)
    return jnp.square(temperature) * parts * losses.valid(labels, logits.shape[-1])


def standardise(logits: Array) -> Array:
    """Each example's logits with mean 0 and standard deviation 1 over its classes: a z-score.

    Those of -inf, classes that are left out, stay so, and have no part in the mean. 1e-8 is added to
    the variance, so that logits that are all equal have a gradient.

    Args:
        logits: `[..., C]`.

    Returns:
        `[..., C]` float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import later_losses
        >>> print(later_losses.standardise(jnp.array([4.0, 2.0, 0.0])))
        [ 1.225  0.    -1.225]
    """
    shapes.check(logits=(logits, "number ... C"))
    z = logits.astype(jnp.float32)
    kept = jnp.isfinite(z)
    count = jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.float32)
    finite = jnp.where(kept, z, 0.0)
    centred = jnp.where(kept, finite - jnp.sum(finite, axis=-1, keepdims=True) / count, 0.0)
    variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / count
    return jnp.where(kept, centred * jax.lax.rsqrt(variance + _ADDED), z)


def standardised_kl(logits: Array, teacher_logits: Array, temperature: ArrayLike) -> Array:
    """`losses.soft_kl` of standardised logits: the student need not match the size of the teacher's.

    `T^2 KL(softmax(standardise(v) / T), softmax(standardise(z) / T))`. T is a base temperature, in
    units of the standard deviation. (The authors' code divides by C - 1 where the paper, and this,
    divides by C.)

    Source: Sun et al., "Logit standardization in knowledge distillation", 2024.

    Args:
        logits: `[..., C]` of the student.
        teacher_logits: `[..., C]`.
        temperature: scalar above 0; 2 in most of the paper.

    Returns:
        `[...]` float32, in nats times T^2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import later_losses
        >>> teacher = jnp.array([4.0, 2.0, 0.0])
        >>> print(jnp.abs(later_losses.standardised_kl(3 * teacher + 1, teacher, 2.0)) < 1e-5)
        True
    """
    shapes.check(logits=(logits, "number ... C"), teacher_logits=(teacher_logits, "number ... C"))
    log_p, log_q = _log_probs(standardise(logits), standardise(teacher_logits), temperature)
    return jnp.square(temperature) * _kl(log_p, log_q)


def transformed_teacher(
    logits: Array, teacher_logits: Array, temperature: ArrayLike, *, weighted: bool = True
) -> Array:
    """KL(p, softmax(z)): the teacher alone has a temperature, so the student's entropy is regularised.

    p is the power transform `softmax(v)^(1/T)`, normalised. The weight of an example is what it is
    divided by, `sum_i softmax(v)_i^(1/T)`: the softer the teacher's prediction, the larger. There is no
    factor T^2: the gradient `w (softmax(z) - p)` doesn't shrink with T.

    Source: Zheng and Yang, "Knowledge distillation based on transformed teacher matching", 2024 (TTM,
    and with weights WTTM).

    Args:
        logits: `[..., C]` of the student, at temperature 1.
        teacher_logits: `[..., C]`.
        temperature: scalar above 0, 1 / gamma of the paper.
        weighted: multiply by the weight.

    Returns:
        `[...]` float32, in nats.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import later_losses
        >>> student, teacher = jnp.array([3.0, 1.0, 1.0]), jnp.array([4.0, 2.0, 0.0])
        >>> for weighted in (False, True):
        ...     loss = later_losses.transformed_teacher(student, teacher, 2.0, weighted=weighted)
        ...     print(f"{loss:.3f}")
        0.077
        0.107
    """
    log_p, log_q = _log_probs(logits, teacher_logits, temperature, student_temperature=1.0)
    divergence = _kl(log_p, log_q)
    if not weighted:
        return divergence
    powers = losses.log_softmax(teacher_logits) / temperature
    return jax.lax.stop_gradient(jnp.exp(jax.nn.logsumexp(powers, axis=-1))) * divergence


def correlation(
    logits: Array,
    teacher_logits: Array,
    temperature: ArrayLike,
    *,
    inter_weight: ArrayLike = 1.0,
    intra_weight: ArrayLike = 1.0,
    weight: Array | None = None,
) -> Array:
    """1 less Pearson's correlation of p and q, of each example's classes and of each class's examples.

    `T^2 (inter_weight * (1 - r_n) + intra_weight * (1 - mean_c r_c))`. r_n is the correlation of example
    n's probabilities over the classes; r_c that of class c's probabilities over the batch. Correlations
    ask for the order and the proportions alone. They don't shrink at a high temperature (there they are
    those of the logits), but the authors' code has the factor T^2: divide the weights by it if T varies.

    The second term is one number of all examples that are handed over together, so its value belongs to
    them all: of a step's whole batch, also over several devices under `jit`; of each micro-batch, with
    micro-batches; of each device's own part under `pmap`. `train_step.Fused` would take it over chunks
    and their padding: don't.

    Source: Huang et al., "Knowledge distillation from a stronger teacher" (DIST), 2022.

    Args:
        logits: `[..., C]` of the student; all leading dimensions are examples.
        teacher_logits: `[..., C]`.
        temperature: scalar above 0.
        inter_weight: of the first term (beta in the paper).
        intra_weight: of the second (gamma in the paper).
        weight: float `[...]`, 0 or more; how much an example counts in the second term, 0 for padding.

    Returns:
        `[...]` float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import later_losses
        >>> student = jnp.array([[3.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
        >>> teacher = jnp.array([[4.0, 2.0, 0.0], [0.0, 4.0, 2.0], [1.0, 0.0, 3.0]])
        >>> print(later_losses.correlation(student, teacher, temperature=2.0))
        [0.248 0.14  0.173]
        >>> print(later_losses.correlation(student, teacher, temperature=2.0, intra_weight=0.0))
        [0.137 0.029 0.062]
    """
    shapes.check(
        logits=(logits, "number ... C"),
        teacher_logits=(teacher_logits, "number ... C"),
        weight=(weight, "float? ..."),
    )
    ranges.check_plain(inter_weight=inter_weight, intra_weight=intra_weight)
    num_classes, shape = logits.shape[-1], logits.shape[:-1]
    log_p, log_q = _log_probs(logits, teacher_logits, temperature)
    p, q = jnp.exp(log_p).reshape(-1, num_classes), jnp.exp(log_q).reshape(-1, num_classes)
    kept = (
        (jnp.isfinite(logits) & jnp.isfinite(teacher_logits)).reshape(p.shape).astype(jnp.float32)
    )
    inter = 1.0 - _pearson(p, q, kept, axis=1)
    weights = kept if weight is None else kept * weight.astype(jnp.float32).reshape(-1, 1)
    # What weighs nothing, as padding, may hold anything.
    p, q = (jnp.where(weights > 0, x, 0.0) for x in (p, q))
    of_classes = 1.0 - _pearson(p, q, weights, axis=0)
    present = jnp.any(weights > 0, axis=0).astype(jnp.float32)
    intra = jnp.sum(present * of_classes) / jnp.maximum(jnp.sum(present), 1.0)
    values = inter_weight * inter + intra_weight * intra
    return jnp.square(temperature) * values.reshape(shape)


def _log_probs(
    logits: Array,
    teacher_logits: Array,
    temperature: ArrayLike,
    student_temperature: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """log p of the teacher, a constant, and log q of the student."""
    shapes.check(logits=(logits, "number ... C"), teacher_logits=(teacher_logits, "number ... C"))
    log_p = jax.lax.stop_gradient(losses.log_softmax(teacher_logits, temperature))
    own = temperature if student_temperature is None else student_temperature
    return log_p, losses.log_softmax(logits, own)


def _kl(log_p: Array, log_q: Array) -> Array:
    """`sum_i p_i (log p_i - log q_i)` where a p_i of 0 counts as 0, in the gradients of both too."""
    p = jnp.exp(log_p)
    difference = jnp.where(p == 0, 0.0, log_p) - jnp.where(p == 0, 0.0, log_q)
    return jnp.sum(p * difference, axis=-1)


def _pearson(a: Array, b: Array, weights: Array, *, axis: int) -> Array:
    """The weighted correlation of two arrays `[N, C]` along an axis; 0 where one doesn't vary."""
    total = jnp.maximum(jnp.sum(weights, axis=axis, keepdims=True), jnp.finfo(jnp.float32).tiny)

    def centred(x: Array) -> Array:
        return x - jnp.sum(weights * x, axis=axis, keepdims=True) / total

    def norm(x: Array) -> Array:  # whose gradient at 0 is 0
        square = jnp.sum(weights * jnp.square(x), axis=axis)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)

    a, b = centred(a), centred(b)
    return jnp.sum(weights * a * b, axis=axis) / (norm(a) * norm(b) + _ADDED)
