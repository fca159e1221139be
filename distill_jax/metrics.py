"""Accuracies as sums and counts, which add up over batches, devices and processes."""

import jax.numpy as jnp
from jax import Array


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
    return prediction_counts(jnp.argmax(logits, axis=-1), labels)


def prediction_counts(predicted: Array, labels: Array) -> dict[str, Array]:
    """Counts errors and examples.

    Args:
        predicted: int `[...]`, classes.
        labels: int `[...]`; a label of -1 is unknown and never counts as an error.

    Returns:
        `{"errors", "count"}`, int32 scalars.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import metrics
        >>> counts = metrics.prediction_counts(jnp.array([0, 1, 2]), jnp.array([0, 0, -1]))
        >>> print(counts["errors"], counts["count"])
        1 3
    """
    wrong = (predicted.astype(labels.dtype) != labels) & (labels >= 0)
    return {
        "errors": jnp.sum(wrong, dtype=jnp.int32),
        "count": jnp.asarray(wrong.size, jnp.int32),
    }
