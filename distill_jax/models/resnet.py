"""The Flax module of residual networks for small images (He et al. 2015, section 4.2)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from distill_jax import shapes
from distill_jax.models.modules import convolve, dense, from_bytes

STAGES = 3  # of equal depth; each halves the sides of the one before and doubles its channels


class ResNet(nn.Module):
    """`models.resnet`."""

    depth: int
    num_classes: int
    width: int
    dtype: Any
    scaling: tuple[float, float]
    gradient_dtype: Any = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Logits `[B, C]`."""
        start = nn.initializers.lecun_normal()  # Flax's
        output = dense(self.num_classes, self.dtype, self.gradient_dtype, start, "output")
        return output(self.hidden_activations(images, train)).astype(jnp.float32)

    @nn.compact
    def hidden_activations(self, images: Array, train: bool) -> Array:
        """What the output layer is applied to, means over all places: `[B, 4 * width]`."""
        shapes.check(inputs=(images, "any B H W *"))
        x = from_bytes(images, self.dtype, self.scaling)
        x = x if x.ndim == 4 else x[..., None]
        dtypes = self.dtype, self.gradient_dtype
        x = _conv(self.width, 1, *dtypes, "first_conv")(x)
        x = jax.nn.relu(_norm(train, self.dtype, "first_norm")(x))
        for name in block_names(self.depth):
            _, stage, block = name.split("_")
            stride = 2 if int(stage) and not int(block) else 1
            x = Block(self.width * 2 ** int(stage), stride, *dtypes, name=name)(x, train)
        return jnp.mean(x, axis=(1, 2))


class Block(nn.Module):
    """Two convolutions, beside a shortcut without parameters (option A)."""

    channels: int
    stride: int
    dtype: Any
    gradient_dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`[B, H, W, channels]` -> `[B, H / stride, W / stride, channels]`, rounded up."""
        norm = functools.partial(_norm, train, self.dtype)
        dtypes = self.dtype, self.gradient_dtype
        y = _conv(self.channels, self.stride, *dtypes, "conv_0")(x)
        y = _conv(self.channels, 1, *dtypes, "conv_1")(jax.nn.relu(norm("norm_0")(y)))
        x = x[:, :: self.stride, :: self.stride]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.channels - x.shape[-1])))
        return jax.nn.relu(x + norm("norm_1")(y))


def block_names(depth: int) -> list[str]:
    """The blocks in their order, such as "block_0_1": the second of the first stage.

    Examples:
        >>> block_names(14)
        ['block_0_0', 'block_0_1', 'block_1_0', 'block_1_1', 'block_2_0', 'block_2_1']
    """
    return [f"block_{stage}_{i}" for stage in range(STAGES) for i in range((depth - 2) // 6)]


class Convolution(nn.Module):
    """`nn.Conv` of 3x3 without bias, whose gradients are summed in a dtype of their own.

    `nn.Conv` rounds them to the dtype of the arithmetic, in which they are then summed over devices.
    """

    channels: int
    stride: int
    dtype: Any
    gradient_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, H, W, c]` -> `[B, H / stride, W / stride, channels]`, rounded up; in `dtype`."""
        start = nn.initializers.he_normal()
        kernel = self.param("kernel", start, (3, 3, x.shape[-1], self.channels))
        convolution = functools.partial(_of_windows, self.stride)
        return convolve(convolution, self.gradient_dtype, x.astype(self.dtype), kernel)


def _of_windows(stride: int, x: Array, kernel: Array) -> Array:
    """The convolution with kernels `[3, 3, c, channels]`, padded by one."""
    margin = ((1, 1), (1, 1))
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), margin, dimension_numbers=layout
    )


def _conv(channels: int, stride: int, dtype: Any, gradient_dtype: Any, name: str) -> nn.Module:
    if dtype != gradient_dtype:
        return Convolution(channels, stride, dtype, gradient_dtype, name=name)
    return nn.Conv(
        channels,
        (3, 3),
        strides=stride,
        padding=1,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


def _norm(train: bool, dtype: Any, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype, name=name)
