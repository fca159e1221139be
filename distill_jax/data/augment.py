"""Augmentation of images: `jitter` inside the step, distorted views of a whole set, numbered views.

A scheme of numbered views (`shifts`, `distortions`, `handwriting`) says what view v of an example is,
always the same. So the teacher's logits of every view can be kept (`soft_targets.write_views`), and the
student sees a view with the logits of that same view (`random_view`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import platforms, ranges, shapes
from distill_jax.data import distortion
from distill_jax.data.images import Examples
from distill_jax.errors import UserError
from distill_jax.train_step import Batch, Constants, Transform


class Views(NamedTuple):
    """A scheme of numbered views of images.

    name: says all that decides what a view is. num_views: V of an example. make: `(images
    [B, H, W, ...], ids int [B], numbers int32 [B]) -> images`, of each example the view of its number,
    0 to V - 1.
    """

    name: str
    num_views: int
    make: Callable[[Array, Array, Array], Array]

    @property
    def field(self) -> str:
        """The field of a batch that has the teacher's logits of all views `[B, V, C]`."""
        return f"teacher_logits of {self.name}"


def jitter(pixels: int) -> Transform:
    """Moves each image by up to `pixels` in any direction, filling with zeros (section 3).

    Raises:
        UserError: for pixels that are no whole number, 0 or more; at trace time, if the batch has cached
            soft targets. They belong to the original images; put `online_teacher` after the jitter
            instead, or show those of all shifts by `random_view`.
    """
    ranges.check_value("the pixels of jitter", pixels, ranges.count(0))

    def move(batch: Batch, key: Array, constants: Constants = None) -> Batch:
        if _cached(batch):
            raise UserError(
                "cached soft targets can't be joined to jittered images: set jitter to 0, or compute "
                "them in the step (train_step.online_teacher after the jitter), or keep those of all "
                "shifts (soft_targets.write_views)"
            )
        shapes.check_fields(batch, "the batch", inputs="number B H W *")
        images = batch["inputs"]
        corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pixels + 1)
        return {**batch, "inputs": _shift(images, corners, pixels)}

    return move


def shifts(pixels: int) -> Views:
    """The views that `jitter` draws from: the image moved by up to `pixels` in any direction.

    View v is the image moved down by `pixels - v // side` and to the right by `pixels - v % side`, with
    `side = 2 * pixels + 1`; the one in the middle is the image as it is.

    Raises:
        UserError: for pixels that are no whole number, 0 or more.

    Examples:
        >>> views = shifts(1)
        >>> image = jnp.arange(1, 10).reshape(1, 3, 3)
        >>> print(views.name, views.num_views)
        shifts(1) 9
        >>> print(views.make(image, jnp.array([7]), jnp.array([8]))[0])
        [[5 6 0]
         [8 9 0]
         [0 0 0]]
    """
    ranges.check_value("the pixels of shifts", pixels, ranges.count(0))
    side = 2 * pixels + 1

    def make(images: Array, ids: Array, numbers: Array) -> Array:
        corners = jnp.stack(jnp.divmod(numbers, jnp.int32(side)), axis=-1)
        return _shift(images, corners, pixels)

    return Views(f"shifts({pixels})", side**2, make)


def distortions(count: int, difficulty: float, seed: int) -> Views:
    """Random distortions as numbered views: view v of an example is the one that `views` makes.

    Args:
        count: V.
        difficulty: 0 or more; see `data.distortion`.
        seed: of all randomness; a view is a function of it, the example's id and v.

    Raises:
        UserError: for numbers that aren't allowed.
    """
    ranges.check_value("the count of distortions", count, ranges.count())
    ranges.check_value("the difficulty of distortions", difficulty, ranges.at_least(0))

    def distort(images: Array, keys: Array) -> Array:
        return distortion.distort(images, keys, difficulty)

    name = f"distortions(difficulty={float(difficulty)!r}, seed={seed})"
    return Views(name, count, _by_number(distort, seed))


def handwriting(count: int, seed: int) -> Views:
    """Digits or letters as other hands might write them, as numbered views.

    Args:
        count: V. Without cached logits it may be as large as int32: every view is then a new one.
        seed: of all randomness; a view is a function of it, the example's id and v.

    Raises:
        UserError: for a count that isn't allowed.
    """
    ranges.check_value("the count of handwriting", count, ranges.count(1, 2**31 - 1))
    return Views(
        f"handwriting(seed={seed})", count, _by_number(distortion.distort_handwriting, seed)
    )


def _by_number(distort: Callable[[Array, Array], Array], seed: int) -> Callable[..., Array]:
    """`Views.make` of what distorts images by keys; a key is made of the view's number and the id."""
    key = jax.random.key(seed)

    def make(images: Array, ids: Array, numbers: Array) -> Array:
        keys = jax.vmap(lambda v, i: jax.random.fold_in(jax.random.fold_in(key, v), i))(
            numbers, ids
        )
        return distort(images, keys)

    return make


def random_view(views: Views) -> Transform:
    """Shows each example in one of its views, with the teacher's logits of the same view.

    A new view is drawn in each step. Of the batch's `views.field` `[B, V, C]`, which
    `soft_targets.attach(..., views=views)` joined, the row of that view becomes "teacher_logits"
    `[B, C]`. Without that field, in the training of a teacher, the images alone are changed.

    Raises:
        UserError: at trace time, if the batch has soft targets of other views or of the original images;
            if it lacks "id" or "inputs".
    """

    def show(batch: Batch, key: Array, constants: Constants = None) -> Batch:
        others = [name for name in _cached(batch) if name != views.field]
        if others:
            raise UserError(
                f"the batch has {', '.join(others)}, which are not of the views {views.name}: join "
                "those (soft_targets.attach with views), or compute them in the step afterwards"
            )
        shapes.check_fields(batch, "the batch", inputs="number B H W *", id="int B")
        numbers = jax.random.randint(key, batch["id"].shape, 0, views.num_views)
        shown = {name: field for name, field in batch.items() if name != views.field}
        shown["inputs"] = views.make(batch["inputs"], batch["id"], numbers)
        if views.field in batch:
            logits = batch[views.field]
            size = batch["id"].shape[0]
            shapes.check(**{views.field: (logits, f"float {size} {views.num_views} C")})
            chosen = jnp.take_along_axis(logits, numbers[:, None, None], axis=1)
            shown["teacher_logits"] = chosen[:, 0]
        return shown

    return show


def _shift(images: Array, corners: Array, pixels: int) -> Array:
    """Images cut at corners `[B, 2]`, 0 to 2 * pixels, of themselves with margins of zeros."""
    margins = [(0, 0), (pixels, pixels), (pixels, pixels)] + [(0, 0)] * (images.ndim - 3)
    if platforms.current() == "tpu":  # where slices are cut in a loop, one example after the other
        return _shift_all(jnp.pad(images, margins), corners, pixels)

    # On a CPU dynamic_slice of padded uint8 was the fastest of eleven ways, 10x faster than roll.
    def crop(padded: Array, corner: Array) -> Array:
        start = [corner[0], corner[1]] + [jnp.int32(0)] * (padded.ndim - 2)
        return jax.lax.dynamic_slice(padded, start, images.shape[1:])

    return jax.vmap(crop)(jnp.pad(images, margins), corners)


def _shift_all(padded: Array, corners: Array, pixels: int) -> Array:
    """The same: along one axis, then the other, by all shifts, of which each image takes its own."""
    for axis in (1, 2):
        size = padded.shape[axis] - 2 * pixels
        corner = corners[:, axis - 1].reshape(-1, *[1] * (padded.ndim - 1))
        found = jax.lax.slice_in_dim(padded, 0, size, axis=axis)
        for k in range(1, 2 * pixels + 1):
            moved = jax.lax.slice_in_dim(padded, k, k + size, axis=axis)
            found = jnp.where(corner == k, moved, found)
        padded = found
    return padded


def _cached(fields: Any) -> list[str]:
    """The fields that are a teacher's, of the inputs as they are."""
    return [name for name in fields if name.startswith("teacher_")]


def views(
    examples: Examples, count: int, difficulty: float, seed: int, batch_size: int = 2048
) -> Examples:
    """Makes a larger set: `count` distorted views of each example.

    View v of an example is a function of the seed, the example's id and v only, so that a subset of the
    examples, or another order, gives the same images.

    Args:
        examples: "id" int32 `[N]` from 0 on, "inputs" as for `distortion.distort`, and other fields.
        count: views of an example.
        difficulty: 0 or more (`data.distortion`); 0, which needs a count of 1, returns the examples
            unchanged.
        seed: of all randomness.
        batch_size: images that are distorted at a time; it limits the memory.

    Returns:
        `[count * N]`, view 0 of all examples, then view 1 of all, and so on. "id" is
        `id * count + v`, int32; "inputs" is distorted; every other field is repeated.

    Raises:
        UserError: for images that `distortion.distort` refuses; a count below 1, or above 1 of
            undistorted images; a difficulty below 0; ids that would not fit int32; cached soft targets,
            which belong to the original images.
    """
    if count < 1 or (difficulty == 0 and count != 1):
        raise UserError(f"views must be at least 1, and 1 at difficulty 0, not {count}")
    if not difficulty >= 0:
        raise UserError(f"the difficulty of a distortion must be 0 or more, not {difficulty}")
    if difficulty == 0:
        return examples
    if _cached(examples):
        raise UserError(
            "cached soft targets can't be joined to distorted images: make the views first, "
            "then their soft targets"
        )
    fields = {**dict.fromkeys(examples, "any N *"), "id": "int N", "inputs": "int N H W *"}
    shapes.check_fields(examples, "the set of examples", **fields)
    ids = examples["id"].astype(np.int64)[None] * count + np.arange(count)[:, None]
    if ids.max(initial=0) > np.iinfo(np.int32).max:
        raise UserError(
            f"{count} views of an example with id {examples['id'].max()} need ids up to "
            f"{ids.max()}, more than int32 holds; make fewer views"
        )
    repeated = {
        name: np.concatenate([field] * count)
        for name, field in examples.items()
        if name not in ("id", "inputs")
    }
    images = _make_views(examples, count, difficulty, seed, batch_size)
    return {"id": ids.ravel().astype(np.int32), "inputs": images, **repeated}


def _make_views(
    examples: Examples, count: int, difficulty: float, seed: int, batch_size: int
) -> np.ndarray:
    images, size = examples["inputs"], len(examples["inputs"])
    made = np.empty((count, *images.shape), np.uint8)
    for view in range(count):
        key = jax.random.fold_in(jax.random.key(seed), view)
        for start in range(0, size, batch_size):
            # The last batch is padded with the last example, so that one compiled program suffices.
            rows = np.minimum(start + np.arange(min(batch_size, size)), size - 1)
            batch = _distort_by_id(images[rows], examples["id"][rows], key, difficulty)
            made[view, start : start + batch_size] = np.asarray(batch)[: size - start]
    return made.reshape(-1, *images.shape[1:])


@jax.jit
def _distort_by_id(images: Array, ids: Array, key: Array, difficulty: ArrayLike) -> Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    return distortion.distort(images, keys, difficulty)
