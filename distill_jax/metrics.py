"""Accuracies as sums and counts, which add up over batches and devices; the quality of predictions."""

import jax.numpy as jnp
from jax import Array

from distill_jax import batches, losses, shapes


def error_counts(logits: Array, labels: Array, weight: Array | None = None) -> dict[str, Array]:
    """`prediction_counts` of the most probable classes.

    Args:
        logits: `[..., C]`.
        labels: int `[...]`.
        weight: as for `prediction_counts`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import metrics
        >>> logits = jnp.array([[2.0, 1.0], [0.0, 1.0]])
        >>> counts = metrics.error_counts(logits, jnp.array([0, 0]))
        >>> print(counts["errors"], counts["count"])
        1 2
    """
    shapes.check(logits=(logits, "number ... C"), labels=(labels, "int ..."))
    return prediction_counts(jnp.argmax(logits, axis=-1), labels, weight)


def prediction_counts(
    predicted: Array, labels: Array, weight: Array | None = None
) -> dict[str, Array]:
    """Counts known labels, and the errors among them.

    Args:
        predicted: int `[...]`, classes.
        labels: int `[...]`; one below 0 is unknown, and not counted.
        weight: float32 `[B]` or `[B, T]`: each label counts as its weight (`batches.weights`).

    Returns:
        `{"errors", "count"}`, int32 scalars; float32 sums of weights if there are any.

    Raises:
        UserError: for labels of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import metrics
        >>> counts = metrics.prediction_counts(jnp.array([0, 1, 2]), jnp.array([0, 0, -1]))
        >>> print(counts["errors"], counts["count"])
        1 2
    """
    shapes.check(predicted=(predicted, "int ..."), labels=(labels, "int ..."))
    labels = jnp.asarray(labels)
    known = labels >= 0
    wrong = (predicted.astype(labels.dtype) != labels) & known
    if weight is None:
        return {
            "errors": jnp.sum(wrong, dtype=jnp.int32),
            "count": jnp.sum(known, dtype=jnp.int32),
        }
    weight = batches.spread(weight, wrong)
    return {
        "errors": jnp.sum(jnp.where(wrong, weight, 0.0)),
        "count": jnp.sum(jnp.where(known, weight, 0.0)),
    }


def multi_label_counts(
    logits: Array, labels: Array, weight: Array | None = None
) -> dict[str, Array]:
    """Counts the yes-or-no decisions of examples with several classes, and those that are wrong.

    A class is predicted where its probability, `sigmoid(z)`, is above a half.

    Args:
        logits: `[..., C]`.
        labels: int `[..., C]`, 0 or 1; one below 0 is unknown, and not counted.
        weight: float32 `[B]` or `[B, T]`: each example counts as its weight (`batches.weights`).

    Returns:
        int32 scalars, float32 sums of weights if there are any: "errors" of the decisions, and "count",
        the known labels; "inexact", of the examples those with an error, and "examples", those with a
        known label.

    Raises:
        UserError: for labels of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import metrics
        >>> logits = jnp.array([[2.0, -1.0, 3.0], [1.0, -1.0, -1.0]])
        >>> counts = metrics.multi_label_counts(logits, jnp.array([[1, 1, 0], [1, 0, -1]]))
        >>> print(counts["errors"], counts["count"], counts["inexact"], counts["examples"])
        2 5 1 2
    """
    shapes.check(logits=(logits, "number ... C"), labels=(labels, "int ... C"))
    known = labels >= 0
    wrong = ((logits > 0) != (labels > 0)) & known

    def count(flags: Array) -> Array:
        if weight is None:
            return jnp.sum(flags, dtype=jnp.int32)
        return jnp.sum(jnp.where(flags, batches.spread(weight, flags), 0.0))

    return {
        "errors": count(wrong),
        "count": count(known),
        "inexact": count(jnp.any(wrong, axis=-1)),
        "examples": count(jnp.any(known, axis=-1)),
    }


def agreement(logits: Array, teacher_logits: Array) -> Array:
    """The share of examples for which both have the same most probable class: float32 `[]`.

    Args:
        logits, teacher_logits: `[..., C]`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import metrics
        >>> print(metrics.agreement(jnp.eye(4), jnp.eye(4).at[0].set(jnp.array([0.0, 0, 0, 9]))))
        0.75
    """
    shapes.check(logits=(logits, "number ... C"), teacher_logits=(teacher_logits, "number ... C"))
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
    return jnp.mean(same, dtype=jnp.float32)


def negative_log_likelihood(logits: Array, labels: Array) -> Array:
    """The mean of -log q(label) over known labels, in nats: float32 `[]`.

    Args:
        logits: `[..., C]`.
        labels: int `[...]`, below 0 where unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import metrics
        >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
        >>> print(f"{metrics.negative_log_likelihood(logits, jnp.array([0, -1])):.3f}")
        0.693
    """
    known = jnp.sum(labels >= 0, dtype=jnp.float32)
    return jnp.sum(losses.hard_cross_entropy(logits, labels)) / known


def expected_calibration_error(logits: Array, labels: Array, bins: int = 15) -> Array:
    """How far confidence is from accuracy: float32 `[]`, 0 for a net that is calibrated.

    Known labels are sorted into bins of equal width by the largest probability; the differences of mean
    probability and accuracy are averaged over bins by their size (Guo et al., arXiv 1706.04599, Eq. 3).

    Args:
        logits: `[..., C]`.
        labels: int `[...]`, below 0 where unknown.
        bins: of 0..1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import metrics
        >>> sure = jnp.log(jnp.array([[0.9, 0.1]] * 4))
        >>> print(f"{metrics.expected_calibration_error(sure, jnp.array([0, 0, 0, 1])):.2f}")
        0.15
    """
    shapes.check(logits=(logits, "number ... C"), labels=(labels, "int ..."))
    confidence = jnp.max(losses.softmax(logits), axis=-1)
    known = (labels >= 0).astype(jnp.float32)
    right = (jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels).astype(jnp.float32)
    which = jnp.minimum((confidence * bins).astype(jnp.int32), bins - 1)
    gaps = jnp.zeros(bins).at[which].add(known * (right - confidence))
    return jnp.sum(jnp.abs(gaps)) / jnp.sum(known)
