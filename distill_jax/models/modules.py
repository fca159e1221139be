"""The Flax modules of the models that are ready made, and what they compute with."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax import platforms, ranges, shapes
from distill_jax.errors import UserError

Activation = Callable[[Array], Array]


def dense(
    features: int,
    dtype: Any,
    gradient_dtype: Any,
    kernel_init: nn.initializers.Initializer,
    name: str,
) -> nn.Module:
    """A layer that computes in `dtype`; its gradients have, and are summed in, `gradient_dtype`.

    `nn.Dense` rounds them to the dtype of the arithmetic, in which they are then summed over devices.
    """
    if dtype == gradient_dtype:
        return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)
    return Dense(features, dtype, gradient_dtype, kernel_init, name=name)


class Dense(nn.Module):
    """`nn.Dense` with gradients in another dtype than that of the arithmetic."""

    features: int
    dtype: Any
    gradient_dtype: Any
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` -> `[..., features]`, in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return affine(self.gradient_dtype, x.astype(self.dtype), kernel, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def affine(gradient_dtype: Any, x: Array, kernel: Array, bias: Array) -> Array:
    """`x @ kernel + bias` in the dtype of x.

    Args:
        gradient_dtype: that the gradients of the kernel and the bias are summed in.
        x: `[..., D]`.
        kernel: `[D, units]`.
        bias: `[units]`.
    """
    product = x @ kernel.astype(x.dtype)
    return product + jnp.broadcast_to(bias.astype(x.dtype), product.shape)


def _affine(gradient_dtype: Any, x: Array, kernel: Array, bias: Array) -> tuple[Array, Any]:
    return affine(gradient_dtype, x, kernel, bias), (x, kernel, bias)


def _affine_gradients(gradient_dtype: Any, kept: Any, cotangent: Array) -> tuple[Array, ...]:
    x, kernel, bias = kept
    slope = cotangent.reshape(-1, cotangent.shape[-1])
    of_kernel = jnp.matmul(
        x.reshape(-1, x.shape[-1]).T, slope, preferred_element_type=gradient_dtype
    )
    of_bias = jnp.sum(slope, axis=0, dtype=gradient_dtype)
    back = cotangent @ kernel.astype(x.dtype).T
    return back, of_kernel.astype(kernel.dtype), of_bias.astype(bias.dtype)


affine.defvjp(_affine, _affine_gradients)


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
    gradient_dtype: Any = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits `[B, C]`."""
        x = self.hidden_activations(inputs)
        start = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "truncated_normal")
        return self._layer(self.num_classes, start, "output")(x).astype(jnp.float32)

    @nn.compact
    def hidden_activations(self, inputs: Array) -> Array:
        """What the output layer is applied to: `[B, D]`."""
        shapes.check(inputs=(inputs, "any B *"))
        x = from_bytes(inputs.reshape(inputs.shape[0], -1), self.dtype, self.scaling)
        x = self._drop(x, self.input_dropout)
        variance = 2 * self.hidden_scale**2  # He's at a scale of 1
        start = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
        for i, units in enumerate(self.hidden):
            x = self._layer(units, start, f"hidden_{i}")(x)
            x = self._drop(self.activation(x), self.hidden_dropout)
        return x

    def _layer(self, units: int, start: nn.initializers.Initializer, name: str) -> Any:
        return dense(units, self.dtype, self.gradient_dtype, start, name)

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
    gradient_dtype: Any = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Features `[B, D]`."""
        shapes.check(inputs=(images, "any B H W *"))
        x = from_bytes(images, self.dtype, self.scaling)
        x = x if x.ndim == 4 else x[..., None]
        for i, (channels, stride) in enumerate(zip(self.channels, self.strides, strict=True)):
            x = self.activation(self._layer(channels, stride, f"conv_{i}")(x))
        return x.reshape(x.shape[0], -1)

    def _layer(self, channels: int, stride: int, name: str) -> Callable[[Array], Array]:
        """The same numbers in two ways: on TPUs as a convolution, elsewhere as a product of patches."""
        start = nn.initializers.he_normal()
        if platforms.current() == "tpu":
            return Convolution(channels, stride, self.dtype, self.gradient_dtype, start, name=name)
        layer: Any = dense(channels, self.dtype, self.gradient_dtype, start, name)
        return lambda x: layer(patches(x, stride))


class Convolution(nn.Module):
    """XLA's convolution with the parameters of a layer on `patches`.

    By the compiler of TPUs it moves half as many bytes as that, and under vmap a third.
    """

    features: int
    stride: int
    dtype: Any
    gradient_dtype: Any
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, H, W, c]` -> `[B, H / stride, W / stride, features]`."""
        _check_sides(x, self.stride)
        inputs = 4 * self.stride**2 * x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        convolution = functools.partial(_of_patches, self.stride)
        y = convolve(convolution, self.gradient_dtype, x.astype(self.dtype), kernel)
        return y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def convolve(
    convolution: Callable[[Array, Array], Array], gradient_dtype: Any, x: Array, kernel: Array
) -> Array:
    """A convolution in the dtype of x.

    Args:
        convolution: `(x, kernel) -> y`, of one dtype; linear in both.
        gradient_dtype: that the gradient of the kernel is summed in.
        x: `[B, H, W, c]`.
        kernel: as `convolution` takes it.
    """
    return convolution(x, kernel.astype(x.dtype))


def _of_patches(stride: int, x: Array, kernel: Array) -> Array:
    """`patches(x, stride) @ kernel` as a convolution."""
    shape = (2, 2, stride, stride, x.shape[-1], kernel.shape[-1])
    windows = kernel.reshape(shape).transpose(0, 2, 1, 3, 4, 5)
    margin = (stride // 2, stride // 2)
    return jax.lax.conv_general_dilated(
        x,
        windows.reshape(2 * stride, 2 * stride, *shape[-2:]),
        (stride, stride),
        (margin, margin),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve(convolution: Any, gradient_dtype: Any, x: Array, kernel: Array) -> tuple[Array, Any]:
    return convolve(convolution, gradient_dtype, x, kernel), (x, kernel)


def _convolve_gradients(
    convolution: Any, gradient_dtype: Any, kept: Any, cotangent: Array
) -> tuple[Array, ...]:
    x, kernel = kept
    # As transposes, which unlike `jax.vjp` have no forward pass for the compiler to take out again.
    back = jax.linear_transpose(lambda x: convolution(x, kernel.astype(x.dtype)), x)
    wide = functools.partial(convolution, x.astype(gradient_dtype))
    (gradient,) = jax.linear_transpose(wide, kernel.astype(gradient_dtype))(
        cotangent.astype(gradient_dtype)
    )
    return *back(cotangent), gradient.astype(kernel.dtype)


convolve.defvjp(_convolve, _convolve_gradients)


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
    _check_sides(x, stride)
    batch, height, width, channels = x.shape
    margin = (stride // 2, stride // 2)
    x = jnp.pad(x, ((0, 0), margin, margin, (0, 0)))
    rows, columns = height // stride + 1, width // stride + 1
    blocks = x.reshape(batch, rows, stride, columns, stride, channels)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
    corners = [blocks[:, i : rows - 1 + i, j : columns - 1 + j] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(corners, axis=-1)


def _check_sides(x: Array, stride: int) -> None:
    _, height, width, _ = x.shape
    if height % stride or width % stride:
        raise UserError(
            f"images of {height} x {width} at a layer of stride {stride}, which must divide both: "
            "choose other strides, or resize the images"
        )


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
