r"""Losses for very many classes, fused with the output layer: the logits `[B, C]` never exist at once.

The batch is processed in chunks of examples: from the last hidden layer to the losses and, if a gradient
is needed, back. Only the logits of one chunk are in memory. Any loss of logits works (`train_step.Loss`,
built from `distill_jax.losses`) with every kind of soft targets: the teacher's logits or probabilities,
the few numbers per example of a store, or the hidden activations and output layers of the teachers,
whose logits are then computed in chunks too (`soft_targets.mean_probs_of_hidden`).

`mean_loss` computes the gradient in the forward pass, while the logits of a chunk are in memory: three
matrix products, as in the dense loss. `per_example` does not know how its values will be weighted, so it
computes the logits once more in the backward pass.

The idea of chunks whose gradient is computed in the forward pass is that of Liger-Kernel (Hsu et al.,
arXiv 2410.10989).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax import platforms, ranges, shapes
from distill_jax.batches import check_rows
from distill_jax.errors import UserError

Layer = dict[str, Array]
"""An output layer: "kernel" `[D, C]` and, if it has one, "bias" `[C]`."""

ChunkLoss = Callable[[Array, Any, Any], Array]
"""`(logits [b, ..., C] float32, fields of these b examples, constants) -> [b, ...]`."""

Over = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Runs a pass on each device's own examples: `sharding.over_data`."""

_MOST_ROWS = 2048


def on_one_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`Over` for a batch that is not split over devices: returns `run`.

    Examples:
        >>> from distill_jax import fused_loss
        >>> fused_loss.on_one_device(abs) is abs
        True
    """
    return run


class Outcome(NamedTuple):
    """The result for B examples, or for B sequences of frames.

    values: float32 `[B, ...]`, the losses. predicted: int32 `[B, ...]`, the most probable classes.
    """

    values: Array
    predicted: Array


def chunk_rows(batch_size: int, units: int) -> int:
    """Number of examples in a chunk, for hidden activations `[batch_size, units]`.

    On a CPU a sixteenth of the batch, so that a sixteenth of its logits exist; but at least an eighth of
    the units, since the gradient of the kernel takes memory anyway. Each chunk adds to that gradient: 8
    bytes of memory traffic per weight, for 6 operations per weight and example. So an accelerator takes
    an eighth of the batch, but at least 1024 examples. The maximum is 2048, where this traffic no longer
    matters. Chunks have about equal sizes.

    Examples:
        >>> from distill_jax import fused_loss
        >>> fused_loss.chunk_rows(batch_size=16, units=2560)
        16
    """
    parts, fewest = (16, max(128, units // 8)) if platforms.current() == "cpu" else (8, 1024)
    rows = min(max(batch_size // parts, fewest), _MOST_ROWS)
    return -(-batch_size // max(batch_size // rows, 1))


def per_example(
    loss: ChunkLoss,
    hidden: Array,
    layer: Layer,
    fields: Any,
    constants: Any,
    *,
    rows: int | None = None,
) -> Outcome:
    """The loss of each example, differentiable in `hidden` and `layer`.

    Arguments as for `mean_loss`. Its values may be weighted afterwards; the price is that the backward
    pass computes the logits once more.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import fused_loss, losses
        >>> hidden = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> layer = {"kernel": 2 * jnp.eye(2), "bias": jnp.zeros(2)}
        >>> def loss(logits, labels, constants):
        ...     return losses.hard_cross_entropy(logits, labels)
        >>> found = fused_loss.per_example(loss, hidden, layer, jnp.array([0, 0]), None)
        >>> print(found.values, found.predicted)
        [0.127 2.127] [0 1]
    """

    @jax.custom_vjp
    def values(*arguments: Any) -> Outcome:
        return _values(*arguments, loss=loss, rows=rows)

    def backward(arguments: Any, cotangent: Outcome) -> tuple[Any, ...]:
        hidden, layer, fields, constants = arguments
        _, gradients = _gradients(
            hidden, layer, fields, constants, cotangent.values, loss=loss, rows=rows
        )
        return *gradients, None, None

    _check(hidden, layer, fields)
    values.defvjp(lambda *arguments: (values(*arguments), arguments), backward)
    return values(hidden, layer, fields, constants)


def mean_loss(
    loss: ChunkLoss,
    hidden: Array,
    layer: Layer,
    fields: Any,
    constants: Any,
    *,
    weights: Array | None = None,
    rows: int | None = None,
    over: Over = on_one_device,
) -> tuple[Array, Outcome]:
    """The mean of `loss` over a batch, differentiable in `hidden` and `layer`.

    Equal to `jnp.mean(loss(hidden @ kernel + bias, fields, constants))`, in value and gradients; with
    weights, to `jnp.sum(weights * loss(...))`, where weights `[B]` multiply the mean of an example's
    values.
    Products have the dtype of `hidden` and accumulate in float32; the gradients of the layer are summed
    in float32 over the chunks.

    Args:
        loss: per-example values of logits. Only the gradient in the logits is computed: fields and
            constants count as constants.
        hidden: `[B, D]`, activations of the last hidden layer, or `[B, T, D]` of sequences; B need not
            be a multiple of `rows`.
        layer: float32 or in the dtype of `hidden`. To exclude a class, give it a bias of -inf.
        fields: a tree of arrays `[B, ...]`, such as labels and soft targets.
        constants: a tree of values that all examples share: traced scalars, the layer of a teacher.
        weights: float32 `[B]`, or `[B, T]` of sequences, that sum to 1 for a weighted mean; None: all
            the same.
        rows: examples in a chunk; None: `chunk_rows` of the examples of one device.
        over: `sharding.over_data(mesh)` if the batch is split over devices.

    Returns:
        The mean, float32, and the outcome, through which no gradient flows.

    Raises:
        UserError: for a layer that isn't a kernel with or without a bias, or that `hidden` doesn't fit;
            for a field that isn't of B examples.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from distill_jax import fused_loss, losses
        >>> hidden = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> layer = {"kernel": 2 * jnp.eye(2), "bias": jnp.zeros(2)}
        >>> def loss(logits, labels, constants):
        ...     return losses.hard_cross_entropy(logits, labels)
        >>> def mean(layer):
        ...     return fused_loss.mean_loss(loss, hidden, layer, jnp.array([0, 0]), None)[0]
        >>> value, gradients = jax.value_and_grad(mean)(layer)
        >>> print(f"{value:.3f}", gradients["bias"])
        1.127 [-0.5 0.5]
    """

    def mean_of(values: Array, weights: Array | None) -> Array:
        return jnp.mean(values) if weights is None else jnp.sum(_spread(weights, values) * values)

    @jax.custom_vjp
    def mean(*arguments: Any) -> tuple[Array, Outcome]:
        *terms, weights = arguments
        outcome = over(functools.partial(_values, loss=loss, rows=rows))(*terms)
        return mean_of(outcome.values, weights), outcome

    def forward(*arguments: Any) -> tuple[tuple[Array, Outcome], Any]:
        *terms, weights = arguments
        same = jnp.full(len(hidden), 1.0 / len(hidden), jnp.float32)
        run = over(functools.partial(_gradients, loss=loss, rows=rows))
        outcome, gradients = run(*terms, same if weights is None else weights)
        return (mean_of(outcome.values, weights), outcome), gradients

    def backward(gradients: Any, cotangent: Any) -> tuple[Any, ...]:
        scale, _ = cotangent
        return *jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients), None, None, None

    _check(hidden, layer, fields)
    if weights is not None:
        check_rows({"weights": weights}, len(hidden), "the hidden activations are of")
    mean.defvjp(forward, backward)
    return mean(hidden, layer, fields, constants, weights)


def _values(
    hidden: Array, layer: Layer, fields: Any, constants: Any, *, loss: ChunkLoss, rows: int | None
) -> Outcome:
    """The losses, chunk by chunk."""

    def one(chunk: tuple[Array, Any]) -> Outcome:
        logits = _logits(chunk[0], layer)
        return _outcome(loss(logits, chunk[1], constants), logits)

    rows, size = _rows(hidden, rows), len(hidden)
    return _joined(jax.lax.map(one, _chunks((hidden, fields), size, rows)), size)


def _gradients(
    hidden: Array,
    layer: Layer,
    fields: Any,
    constants: Any,
    weights: Array,
    *,
    loss: ChunkLoss,
    rows: int | None,
) -> tuple[Outcome, tuple[Array, Layer]]:
    """The losses, and the gradients of their weighted sum in `hidden` and `layer`."""

    def add(total: Layer, chunk: tuple[Array, Any, Array]):
        hidden, fields, weights = chunk
        logits = _logits(hidden, layer)
        values, pull_back = jax.vjp(lambda z: loss(z, fields, constants), logits)
        (slope,) = pull_back(_spread(weights, values))
        narrow = slope.astype(hidden.dtype)
        terms = {
            "kernel": _product(_flat(hidden).T, _flat(narrow)),
            "bias": jnp.sum(_flat(slope), axis=0),
        }
        total = {name: x + terms[name] for name, x in total.items()}
        back = _product(narrow, layer["kernel"].astype(hidden.dtype).T).astype(hidden.dtype)
        return total, (_outcome(values, logits), back)

    rows, size = _rows(hidden, rows), len(hidden)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), layer)
    chunks = (*_chunks((hidden, fields), size, rows), _chunks(weights, size, rows, mode="constant"))
    total, (outcome, back) = jax.lax.scan(add, zeros, chunks)
    total = jax.tree.map(lambda x, like: x.astype(like.dtype), total, layer)
    return _joined(outcome, size), (_joined(back, size), total)


def _outcome(values: Array, logits: Array) -> Outcome:
    return Outcome(values, jnp.argmax(logits, axis=-1).astype(jnp.int32))


def _logits(hidden: Array, layer: Layer) -> Array:
    logits = _product(hidden, layer["kernel"].astype(hidden.dtype))
    if "bias" not in layer:
        return logits
    bias = layer["bias"].astype(jnp.float32)
    return logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _spread(weights: Array, values: Array) -> Array:
    """The weights of values `[b, ...]`: as given, or each example's shared by its own values."""
    shape = weights.shape + (1,) * (values.ndim - weights.ndim)
    share = weights.reshape(shape) / (values.size // weights.size)
    return jnp.broadcast_to(share, values.shape)


def _flat(x: Array) -> Array:
    """`[b, ..., n]` -> `[b ..., n]`."""
    return x.reshape(-1, x.shape[-1])


def _rows(hidden: Array, rows: int | None) -> int:
    """The examples in a chunk, each of which may be a sequence."""
    *shape, units = hidden.shape
    if rows is not None:
        ranges.check_value("rows of a chunk", rows, ranges.count())
    return rows or max(1, chunk_rows(math.prod(shape), units) // math.prod(shape[1:]))


def _chunks(tree: Any, size: int, rows: int, mode: str = "edge") -> Any:
    """`[size, ...]` -> `[n, rows, ...]`, the last chunk filled up.

    By repeating the last example, whose loss is as finite as it is; weights with 0 ("constant").
    """
    rows = min(rows, size)
    padding = -size % rows

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), mode) if padding else x
        return padded.reshape(-1, rows, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _joined(tree: Any, size: int) -> Any:
    """The inverse of `_chunks`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], tree)


def _check(hidden: Array, layer: Layer, fields: Any) -> None:
    size = shapes.check(hidden=(hidden, "float ... D"))["D"]
    bias = {"bias": "float C"} if "bias" in layer else {}
    shapes.check_fields(layer, "the output layer", kernel=f"float {size} C", **bias)
    if set(layer) - {"kernel", "bias"}:
        raise UserError(
            f"the output layer has {', '.join(layer)}; expected a kernel and, if any, a bias"
        )
    check_rows(fields, len(hidden), "the hidden activations are of")
