"""The Flax modules of the models that are ready made, and what they compute with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax import ranges, shapes
from distill_jax.errors import UserError

Activation = Callable[[Array], Array]


class MLP(nn.Module):
    """`models.mlp`."""

    hidden: tuple[int, ...]
    num_classes: int
    input_dropout: float
    hidden_dropout: float
    dtype: Any
    scaling: tuple[float, float]
    activation: Activation
    output_scale: float
    hidden_scale: float = 1.0

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits `[B, C]`."""
        x = self.hidden_activations(inputs)
        start = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "truncated_normal")
        output = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=start, name="output")
        return output(x).astype(jnp.float32)

    @nn.compact
    def hidden_activations(self, inputs: Array) -> Array:
        """What the output layer is applied to: `[B, D]`."""
        shapes.check(inputs=(inputs, "any B *"))
        x = from_bytes(inputs.reshape(inputs.shape[0], -1), self.dtype, self.scaling)
        x = self._drop(x, self.input_dropout)
        variance = 2 * self.hidden_scale**2  # He's at a scale of 1
        start = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
        for i, units in enumerate(self.hidden):
            x = nn.Dense(units, dtype=self.dtype, kernel_init=start, name=f"hidden_{i}")(x)
            x = self._drop(self.activation(x), self.hidden_dropout)
        return x

    def _drop(self, x: Array, rate: float) -> Array:
        if rate == 0.0 or not self.has_rng("dropout"):
            return x
        return dropout(self.make_rng("dropout"), x, rate)


class Trunk(nn.Module):
    """`models.conv_trunk`."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    scaling: tuple[float, float]
    activation: Activation

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Features `[B, D]`."""
        shapes.check(inputs=(images, "any B H W *"))
        x = from_bytes(images, self.dtype, self.scaling)
        x = x if x.ndim == 4 else x[..., None]
        for i, (channels, stride) in enumerate(zip(self.channels, self.strides, strict=True)):
            layer = nn.Dense(
                channels,
                dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(),
                name=f"conv_{i}",
            )
            x = self.activation(layer(patches(x, stride)))
        return x.reshape(x.shape[0], -1)


def patches(x: Array, stride: int) -> Array:
    """What a kernel of size 2 x `stride` sees at each of its places.

    Args:
        x: `[B, H, W, c]`; padded by half a stride on all sides.
        stride: even, divides H and W.

    Returns:
        `[B, H / stride, W / stride, 4 * stride^2 * c]`.

    Raises:
        UserError: if it doesn't divide them.
    """
    batch, height, width, channels = x.shape
    if height % stride or width % stride:
        raise UserError(
            f"images of {height} x {width} at a layer of stride {stride}, which must divide both: "
            "choose other strides, or resize the images"
        )
    margin = (stride // 2, stride // 2)
    x = jnp.pad(x, ((0, 0), margin, margin, (0, 0)))
    rows, columns = height // stride + 1, width // stride + 1
    blocks = x.reshape(batch, rows, stride, columns, stride, channels)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
    corners = [blocks[:, i : rows - 1 + i, j : columns - 1 + j] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(corners, axis=-1)


def from_bytes(x: Array, dtype: Any, scaling: tuple[float, float]) -> Array:
    """Inputs in a dtype of floating point; a UserError if they are neither uint8 nor floating point."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(dtype)
    if x.dtype != jnp.uint8:
        raise UserError(
            f"inputs are {x.dtype}; expected uint8, which are scaled, or floating point, which are "
            "taken as they are: convert them to one of the two"
        )
    zero, unit = scaling
    return (x.astype(dtype) - zero) / unit


def dropout(key: Array, x: Array, rate: float) -> Array:
    """Zeroes a share of `x` `[..., units]` and scales up the rest, with a random byte per value.

    The generator hashes once per number drawn, however narrow, so each 32-bit word serves four units:
    a fifth of a large net's step on a CPU is saved. The rate is rounded to 1/256, and the scale is
    exact for the rounded rate.

    Raises:
        UserError: for a rate that isn't 0 or more, and less than 1.
    """
    ranges.check_value("the dropout rate", rate, ranges.below(1))
    kept = round((1.0 - rate) * 256)
    if kept == 256:
        return x
    units = x.shape[-1]
    words = jax.random.bits(key, (*x.shape[:-1], -(-units // 4)), jnp.uint32)
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., :units]
    scaled = x * jnp.asarray(256 / max(kept, 1), x.dtype)  # a rate near 1 may keep none
    return jnp.where(octets < jnp.uint8(kept), scaled, jnp.zeros((), x.dtype))
