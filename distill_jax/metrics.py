"""Accuracies as sums and counts, which add up over batches, devices and processes."""

import jax.numpy as jnp
from jax import Array


def errors(logits: Array, labels: Array, bias: Array | None = None) -> Array:
    """Which examples the most probable class gets wrong.

    Args:
        logits: `[..., C]`.
        labels: int `[...]`.
        bias: `[C]`, added to the logits; the bias shifts of section 3.

    Returns:
        bool `[...]`.
    """
    shifted = logits if bias is None else logits + bias
    return jnp.argmax(shifted, axis=-1).astype(labels.dtype) != labels


def error_counts(logits: Array, labels: Array) -> dict[str, Array]:
    """`prediction_counts` of the most probable class of logits `[..., C]`."""
    return prediction_counts(jnp.argmax(logits, axis=-1), labels)


def prediction_counts(predicted: Array, labels: Array) -> dict[str, Array]:
    """Errors and examples as int32 sums: `{"errors": [], "count": []}`.

    A label of -1 is unknown and never counts as an error.

    Args:
        predicted: int `[...]`, classes.
        labels: int `[...]`.
    """
    wrong = (predicted.astype(labels.dtype) != labels) & (labels >= 0)
    return {
        "errors": jnp.sum(wrong, dtype=jnp.int32),
        "count": jnp.asarray(wrong.size, jnp.int32),
    }
