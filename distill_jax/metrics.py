"""Accuracies as sums and counts, which add up over batches, devices and processes."""

import jax.numpy as jnp
from jax import Array

from distill_jax import shapes


def error_counts(logits: Array, labels: Array) -> dict[str, Array]:
    """`prediction_counts` of the most probable classes.

    Args:
        logits: `[..., C]`.
        labels: int `[...]`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import metrics
        >>> logits = jnp.array([[2.0, 1.0], [0.0, 1.0]])
        >>> counts = metrics.error_counts(logits, jnp.array([0, 0]))
        >>> print(counts["errors"], counts["count"])
        1 2
    """
    shapes.check(logits=(logits, "number ... C"), labels=(labels, "int ..."))
    return prediction_counts(jnp.argmax(logits, axis=-1), labels)


def prediction_counts(predicted: Array, labels: Array) -> dict[str, Array]:
    """Counts known labels, and the errors among them.

    Args:
        predicted: int `[...]`, classes.
        labels: int `[...]`; one below 0 is unknown, and not counted.

    Returns:
        `{"errors", "count"}`, int32 scalars.

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
    return {
        "errors": jnp.sum(wrong, dtype=jnp.int32),
        "count": jnp.sum(known, dtype=jnp.int32),
    }
