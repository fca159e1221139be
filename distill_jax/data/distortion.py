"""Random distortions of images.

`distort` makes random variants of an image, for sets with few examples per class. An image is rotated,
sheared, scaled, stretched and shifted (one affine map, bilinear); then it is blurred, its contrast is
reduced and noise is added. The amounts are random, uniform and independent; a difficulty d >= 0 sets
their ranges:

    rotation             -0.26 d .. 0.26 d rad
    shear                -0.25 d .. 0.25 d, of x by y
    stretch              exp(-0.17 d .. 0.17 d), of the width; its inverse, of the height
    scale                (18/28)^d .. (29/28)^d
    shift                -3/32 d .. 3/32 d of the width, and of the height
    blur                 0 .. min(0.8 d, 1), the weight of the image smoothed by [1 2 1]/4 both ways
    contrast             0.5^d .. 1, a factor
    noise                0.03 d .. 0.15 d of full white, the standard deviation of normal noise

At d = 0 an image is not changed at all. For characters of 32 x 32 pixels, 1 is a mild distortion and
1.4 a hard one. Pixels from outside the image are black.

`distort_handwriting` is for digits and letters: no noise, but an elastic distortion as of another hand.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax import shapes
from distill_jax.errors import UserError


class _Amounts(NamedTuple):
    """How one image is distorted, float32 scalars; see the module's table."""

    rotation: Array
    shear: Array
    stretch: Array
    scale: Array
    shift_x: Array
    shift_y: Array
    blur: Array
    contrast: Array
    noise: Array


def distort(images: Array, keys: Array, difficulty: ArrayLike) -> Array:
    """Distorts each image by its own random amounts.

    Args:
        images: uint8 `[B, H, W]` or `[B, H, W, channels]`; all channels get the same distortion.
        keys: `[B]`, one for each image.
        difficulty: scalar, 0 or more, may be traced; see the module.

    Returns:
        uint8, the same shape.

    Raises:
        UserError: for images of another dtype or rank.
    """
    difficulty = jnp.asarray(difficulty, jnp.float32)
    return _each(lambda planes, key: _distort_one(planes, key, difficulty), images, keys)


def distort_handwriting(images: Array, keys: Array) -> Array:
    """Distorts each image by its own random affine map and elastic distortion (Simard et al. 2003).

    The ranges are those of the module's table at these numbers: rotation 0.26 rad, shear 0.2, stretch
    exp(0.1), scale exp(0.13) either way, shift 2/28. Besides, a grid of 5 x 5 points over the image is
    moved, each by a normal distance of 1.1/28 of the side in x and in y; between them it is cubic.

    Args:
        images: uint8 `[B, H, W]` or `[B, H, W, channels]`; all channels get the same distortion.
        keys: `[B]`, one for each image.

    Returns:
        uint8, the same shape.

    Raises:
        UserError: for images of another dtype or rank.
    """
    return _each(_distort_handwriting_one, images, keys)


def _each(distort_one: Callable[[Array, Array], Array], images: Array, keys: Array) -> Array:
    """Distorts each image, given as planes `[channels, H, W]`, with its key."""
    size = shapes.check(images=(images, "int B H W *"))["B"]
    shapes.check(keys=(jax.random.key_data(keys), f"int {size} *"))
    if images.dtype != jnp.uint8 or images.ndim not in (3, 4):
        raise UserError(
            "images to be distorted must be uint8 [B, H, W] or [B, H, W, channels], found "
            f"{images.dtype} {list(images.shape)}"
        )
    planes = jnp.moveaxis(images.reshape(*images.shape[:3], -1), -1, 1)
    distorted = jax.vmap(distort_one)(planes, keys)
    return jnp.moveaxis(distorted, 1, -1).reshape(images.shape)


def _distort_one(planes: Array, key: Array, difficulty: Array) -> Array:
    """One image as uint8 planes `[channels, H, W]`."""
    amounts_key, noise_key = jax.random.split(key)
    amounts = _draw(amounts_key, difficulty)
    values = _move(planes, amounts)
    values = values + amounts.blur * (_smooth(values) - values)
    noise = jax.random.normal(noise_key, planes.shape)
    values = amounts.contrast * values + 255 * amounts.noise * noise
    return _as_bytes(values)


def _distort_handwriting_one(planes: Array, key: Array) -> Array:
    amounts_key, grid_key = jax.random.split(key)
    drawn = dict(zip(_HANDWRITING, jax.random.uniform(amounts_key, (6,), minval=-1.0), strict=True))
    amounts = {name: bound * drawn[name] for name, bound in _HANDWRITING.items()}
    stretch, scale = jnp.exp(amounts.pop("stretch")), jnp.exp(amounts.pop("scale"))
    nothing = jnp.float32(0)
    x, y = _sources(
        planes.shape[1:],
        _Amounts(
            **amounts, stretch=stretch, scale=scale, blur=nothing, contrast=nothing, noise=nothing
        ),
    )
    height, width = planes.shape[1:]
    bent = jax.image.resize(jax.random.normal(grid_key, (2, 5, 5)), (2, height, width), "cubic")
    x, y = x + 1.1 / 28 * width * bent[0], y + 1.1 / 28 * height * bent[1]
    return _as_bytes(_sample(planes, x, y))


_HANDWRITING = {
    "rotation": 0.26,
    "shear": 0.2,
    "stretch": 0.1,
    "scale": 0.13,
    "shift_x": 2 / 28,
    "shift_y": 2 / 28,
}
"""The largest amounts either way; of stretch and scale their logarithms."""


def _as_bytes(values: Array) -> Array:
    return jnp.clip(jnp.round(values), 0, 255).astype(jnp.uint8)


def _draw(key: Array, difficulty: Array) -> _Amounts:
    draws = _Amounts(*jax.random.uniform(key, (len(_Amounts._fields),)))

    def between(low: Array | float, high: Array | float, draw: Array) -> Array:
        return low + (high - low) * draw

    def either_way(bound: float, draw: Array) -> Array:
        return difficulty * between(-bound, bound, draw)

    return _Amounts(
        rotation=either_way(0.26, draws.rotation),
        shear=either_way(0.25, draws.shear),
        stretch=jnp.exp(either_way(0.17, draws.stretch)),
        scale=between((18 / 28) ** difficulty, (29 / 28) ** difficulty, draws.scale),
        shift_x=either_way(3 / 32, draws.shift_x),
        shift_y=either_way(3 / 32, draws.shift_y),
        blur=jnp.minimum(0.8 * difficulty, 1.0) * draws.blur,
        contrast=between(0.5**difficulty, 1.0, draws.contrast),
        noise=difficulty * between(0.03, 0.15, draws.noise),
    )


def _move(planes: Array, amounts: _Amounts) -> Array:
    """The affine map about the centre: `[channels, H, W]` uint8 -> float32, 0..255."""
    return _sample(planes, *_sources(planes.shape[1:], amounts))


def _sources(shape: tuple[int, ...], amounts: _Amounts) -> tuple[Array, Array]:
    """The inverse of the affine map: x and y `[H, W]` of where each output pixel's value comes from."""
    height, width = shape
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    x = jnp.arange(width, dtype=jnp.float32)[None, :] - centre_x - width * amounts.shift_x
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - centre_y - height * amounts.shift_y
    x = x / (amounts.scale * amounts.stretch)
    y = y * (amounts.stretch / amounts.scale)
    x = x + amounts.shear * y
    cos, sin = jnp.cos(amounts.rotation), jnp.sin(amounts.rotation)
    return cos * x - sin * y + centre_x, sin * x + cos * y + centre_y


def _sample(planes: Array, x: Array, y: Array) -> Array:
    """Bilinear values at x, y `[H, W]`, in pixels; all outside the image is 0."""
    _, height, width = planes.shape
    # A pixel and its neighbours to the right, below and diagonally below are the bytes of one word: one
    # gather instead of four, and gathers take nearly all of the time here.
    padded = jnp.pad(planes, [(0, 0), (1, 1), (1, 1)]).astype(jnp.uint32)
    upper, lower = padded[:, :-1], padded[:, 1:]
    words = upper[..., :-1] | upper[..., 1:] << 8 | lower[..., :-1] << 16 | lower[..., 1:] << 24

    left = jnp.clip(jnp.floor(x), -1, width - 1)
    top = jnp.clip(jnp.floor(y), -1, height - 1)
    column, row = left.astype(jnp.int32) + 1, top.astype(jnp.int32) + 1
    word = words.at[:, row, column].get(mode="promise_in_bounds")
    corners = [(word >> shift & 255).astype(jnp.float32) for shift in (0, 8, 16, 24)]

    # Beyond the edges the share is 0 or 1, and selects the padding.
    share_x, share_y = jnp.clip(x - left, 0, 1)[None], jnp.clip(y - top, 0, 1)[None]
    above = corners[0] + share_x * (corners[1] - corners[0])
    below = corners[2] + share_x * (corners[3] - corners[2])
    return above + share_y * (below - above)


def _smooth(planes: Array) -> Array:
    """[1 2 1]/4 along both axes. Shifted sums: XLA's convolution is slow on a CPU within a scan."""
    padded = jnp.pad(planes, [(0, 0), (1, 1), (1, 1)])
    rows = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
