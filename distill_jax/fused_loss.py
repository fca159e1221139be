r"""Losses of very many classes that never hold the logits `[B, C]`: fused with the output layer.

A chunk of examples is taken from the last hidden layer to its losses, and, where a gradient is wanted,
back again, before the next one: only the logits of one chunk exist. Any loss of logits serves
(`train_step.Loss`, built of `distill_jax.losses`), and so does every kind of soft targets: the teacher's
logits or probabilities, a store's few numbers per example, or the teachers' own hidden activations and
output layers, whose logits are then not held either (`soft_targets.mean_probs_of_hidden`).

`mean_loss` computes the gradient in the forward pass, as long as the chunk's logits are there: three
matrix products as in the dense loss. `per_example` can't know yet how its values will be weighted, and
makes the logits once more in the backward pass.

The idea of chunks whose gradient is computed in the forward pass is that of Liger-Kernel (Hsu et al.,
arXiv 2410.10989).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Layer = dict[str, Array]
"""An output layer: "kernel" `[D, C]` and "bias" `[C]`."""

ChunkLoss = Callable[[Array, Any, Any], Array]
"""`(logits [b, C] float32, fields of these b examples, constants) -> [b]`."""

Over = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Spreads a pass over the devices that have different examples: `sharding.over_data`."""

_MOST_ROWS = 2048


def on_one_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`Over` for a batch that is not split."""
    return run


class Outcome(NamedTuple):
    """values: `[B]` float32, each example's loss. predicted: int32 `[B]`, the most probable class."""

    values: Array
    predicted: Array


def chunk_rows(batch_size: int, units: int) -> int:
    """Examples of a chunk, of hidden activations `[batch_size, units]`; chunks are about equal.

    On a CPU a sixteenth of the batch, so that a sixteenth of its logits exist; but at least an eighth of
    the units, as the kernel's gradient is in memory anyway. Every chunk adds to it: 8 bytes of memory
    traffic per weight, for 6 operations per weight and example. So an accelerator takes an eighth of
    the batch, of a thousand examples at least; and nobody more than 2048, where that is no matter.
    """
    parts, fewest = (16, max(128, units // 8)) if jax.default_backend() == "cpu" else (8, 1024)
    rows = min(max(batch_size // parts, fewest), _MOST_ROWS)
    return -(-batch_size // max(batch_size // rows, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def per_example(
    loss: ChunkLoss,
    hidden: Array,
    layer: Layer,
    fields: Any,
    constants: Any,
    rows: int | None = None,
) -> Outcome:
    """Each example's loss, differentiable in `hidden` and `layer`; arguments as for `mean_loss`."""
    return _values(loss, rows, hidden, layer, fields, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def mean_loss(
    loss: ChunkLoss,
    hidden: Array,
    layer: Layer,
    fields: Any,
    constants: Any,
    rows: int | None = None,
    over: Over = on_one_device,
) -> tuple[Array, Outcome]:
    """The mean of `loss` over a batch, differentiable in `hidden` and `layer`.

    Equal to `jnp.mean(loss(hidden @ kernel + bias, fields, constants))`, in value and gradients.
    Products take the dtype of `hidden` and accumulate in float32; the gradients of the layer are summed
    in float32 over the chunks.

    Args:
        loss: per-example values of logits. It is differentiated in the logits alone: fields and
            constants count as constants.
        hidden: `[B, D]`, activations of the last hidden layer; B need not be a multiple of `rows`.
        layer: float32 or in the dtype of `hidden`. A class is left out by a bias of -inf.
        fields: a tree of arrays `[B, ...]`, such as labels and soft targets.
        constants: a tree of what is the same for all examples: traced scalars, a teacher's layer.
        rows: examples of a chunk; None: as `chunk_rows` says of those that a device has.
        over: `sharding.over_data(mesh)` if the batch is split over devices.

    Returns:
        The mean, float32, and the outcome, through which no gradient flows.
    """
    outcome = over(functools.partial(_values, loss, rows))(hidden, layer, fields, constants)
    return jnp.mean(outcome.values), outcome


def _per_example_forward(loss: ChunkLoss, *others: Any):
    *arguments, rows = others
    return _values(loss, rows, *arguments), arguments


def _per_example_backward(loss: ChunkLoss, rows: int | None, arguments: Any, cotangent: Outcome):
    hidden, layer, fields, constants = arguments
    _, gradients = _gradients(loss, rows, hidden, layer, fields, constants, cotangent.values)
    return *gradients, None, None


per_example.defvjp(_per_example_forward, _per_example_backward)


def _mean_loss_forward(loss: ChunkLoss, hidden: Array, *others: Any):
    *arguments, rows, over = others
    weights = jnp.full(len(hidden), 1.0 / len(hidden), jnp.float32)
    outcome, gradients = over(functools.partial(_gradients, loss, rows))(
        hidden, *arguments, weights
    )
    return (jnp.mean(outcome.values), outcome), gradients


def _mean_loss_backward(
    loss: ChunkLoss, rows: int | None, over: Over, gradients: Any, cotangent: Any
):
    scale, _ = cotangent
    return *jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients), None, None


mean_loss.defvjp(_mean_loss_forward, _mean_loss_backward)


def _values(
    loss: ChunkLoss, rows: int | None, hidden: Array, layer: Layer, fields: Any, constants: Any
) -> Outcome:
    """The losses, chunk by chunk."""

    def one(chunk: tuple[Array, Any]) -> Outcome:
        logits = _logits(chunk[0], layer)
        return _outcome(loss(logits, chunk[1], constants), logits)

    rows, size = rows or chunk_rows(*hidden.shape), len(hidden)
    return _joined(jax.lax.map(one, _chunks((hidden, fields), size, rows)), size)


def _gradients(
    loss: ChunkLoss,
    rows: int | None,
    hidden: Array,
    layer: Layer,
    fields: Any,
    constants: Any,
    weights: Array,
) -> tuple[Outcome, tuple[Array, Layer]]:
    """The losses, and the gradients of their weighted sum in `hidden` and `layer`."""

    def add(total: Layer, chunk: tuple[Array, Any, Array]):
        hidden, fields, weights = chunk
        logits = _logits(hidden, layer)
        values, pull_back = jax.vjp(lambda z: loss(z, fields, constants), logits)
        (slope,) = pull_back(weights)
        narrow = slope.astype(hidden.dtype)
        total = {
            "kernel": total["kernel"] + _product(hidden.T, narrow),
            "bias": total["bias"] + jnp.sum(slope, axis=0),
        }
        back = _product(narrow, layer["kernel"].astype(hidden.dtype).T).astype(hidden.dtype)
        return total, (_outcome(values, logits), back)

    rows, size = rows or chunk_rows(*hidden.shape), len(hidden)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), layer)
    total, (outcome, back) = jax.lax.scan(
        add, zeros, _chunks((hidden, fields, weights), size, rows)
    )
    total = jax.tree.map(lambda x, like: x.astype(like.dtype), total, layer)
    return _joined(outcome, size), (_joined(back, size), total)


def _outcome(values: Array, logits: Array) -> Outcome:
    return Outcome(values, jnp.argmax(logits, axis=-1).astype(jnp.int32))


def _logits(hidden: Array, layer: Layer) -> Array:
    kernel, bias = layer["kernel"].astype(hidden.dtype), layer["bias"].astype(jnp.float32)
    return _product(hidden, kernel) + bias[None]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _chunks(tree: Any, size: int, rows: int) -> Any:
    """`[size, ...]` -> `[n, rows, ...]`, the last chunk filled up with zeros, which weigh nothing."""
    rows = min(rows, size)
    padding = -size % rows

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) if padding else x
        return padded.reshape(-1, rows, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _joined(tree: Any, size: int) -> Any:
    """The other way round."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], tree)
