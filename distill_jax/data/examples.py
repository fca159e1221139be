"""Image examples as NumPy arrays: what a set of them is, and what every set is checked for."""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from distill_jax import shapes
from distill_jax.errors import UserError

# All arrays share the leading axis N:
#   "id"      int32 [N], unique in its source;
#   "inputs"  uint8 [N, H, W] or [N, H, W, channels] (no trailing axis of 1);
#   "label"   int32 [N].
Examples = dict[str, np.ndarray]

TEST_SPLITS = ("test", "validation", "val")
"""Names of a test set: the first that there is counts."""


class Source(NamedTuple):
    """A data set. Train ids are 0..N-1 and test ids N..N+M-1, so that ids are unique.

    class_names: `[C]`, or empty where they aren't known.
    """

    name: str
    num_classes: int
    train: Examples
    test: Examples
    class_names: tuple[str, ...] = ()


class Counts(NamedTuple):
    """How many classes a set has, and how many examples in train and test."""

    classes: int
    train: int
    test: int


def with_ids(images: np.ndarray, labels: np.ndarray, first_id: int) -> Examples:
    """Examples of images `[N, H, W]` or `[N, H, W, channels]` and labels `[N]`, numbered."""
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    ids = np.arange(first_id, first_id + len(images), dtype=np.int32)
    return {"id": ids, "inputs": images, "label": labels.astype(np.int32)}


def validate(examples: Examples, num_classes: int, what: str) -> None:
    """Checks that examples can be trained on.

    Args:
        examples: needs "id", "inputs" and "label"; any further arrays are checked too.
        num_classes: labels must be integers in 0..num_classes-1.
        what: description of the examples, with which each message begins.

    Raises:
        UserError: if an array is missing; if lengths differ; if there are no examples; if the inputs
            are neither uint8 nor floating point; for NaN or infinity; if labels are not integers or
            out of range.
    """
    missing = [key for key in ("id", "inputs", "label") if key not in examples]
    if missing:
        raise UserError(f"{what}: array {', '.join(missing)} is missing; found {sorted(examples)}")
    for key, array in examples.items():
        if not hasattr(array, "shape"):
            raise UserError(f"{what}: {key} is {shapes.describe(array)}; expected an array")
    lengths = {key: array.shape[:1] for key, array in examples.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {list(length)}" for key, length in lengths.items())
        raise UserError(f"{what}: arrays must have one length, found {listed}")

    ids, images, labels = examples["id"], examples["inputs"], examples["label"]
    if not len(ids):
        raise UserError(f"{what}: no examples")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{what}: inputs must be uint8 or floating point, found {images.dtype}")
    for key, array in examples.items():
        if np.issubdtype(array.dtype, np.floating):
            broken = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            if broken.any():
                raise UserError(
                    f"{what}: {key} has NaN or infinity in {broken.sum()} of {len(ids)} examples, "
                    f"the first has id {ids[broken.argmax()]}"
                )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what}: label must be an integer, found {labels.dtype}")
    bad = np.logical_or(labels < 0, labels >= num_classes)
    if bad.any():
        first = bad.argmax()
        raise UserError(
            f"{what}: {bad.sum()} of {len(bad)} labels are outside 0..{num_classes - 1}, "
            f"the first is {labels[first]} at id {ids[first]}"
        )


def check_classes(num_classes: int, name: str) -> None:
    """Raises a UserError for a set of less than two classes."""
    if num_classes < 2:
        raise UserError(f"{name}: there is {num_classes} class; a net tells two or more apart")


def check_share(share: float, has_test: bool, name: str) -> None:
    """Raises a UserError unless a set has a test set, or is given the share to hold out as one."""
    if has_test and share:
        raise UserError(f"data.test_share is {share}, but {name} has a test set: set it to 0")
    if not has_test and not share:
        raise UserError(
            f"{name} has no test set, and data.test_share is 0: set it to the share of each class to "
            "hold out, such as 0.2"
        )


def draw_test(labels: np.ndarray, share: float, seed: int, name: str) -> np.ndarray:
    """Draws a share of each class at random as the test set, and leaves one example or more of each.

    Args:
        labels: int `[N]`.
        share: above 0, and less than 1.
        seed: of the draw.
        name: of the set, for the line that says what was drawn.

    Returns:
        bool `[N]`: which examples are the test set.

    Raises:
        UserError: if these would be none.
    """
    random, drawn = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        drawn[rows[: min(round(share * len(rows)), len(rows) - 1)]] = True
    if not drawn.any():
        raise UserError(f"{name}: data.test_share is {share}, which is no example of any class")
    say_once(
        f"{name}: the test set is {drawn.sum()} of {len(drawn)} examples, {100 * share:g} % of each "
        f"class, drawn by seed {seed}"
    )
    return drawn


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes the central square: uint8 `[H, W(, channels)]` -> uint8 `[side, side, channels]`."""
    image = np.atleast_3d(image)
    height, width, channels = image.shape
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    square = image[top : top + size, left : left + size]
    planes = [Image.fromarray(square[..., channel]) for channel in range(channels)]
    resized = [plane.resize((side, side), Image.Resampling.BILINEAR) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized], axis=-1)


@functools.cache
def say_once(line: str) -> None:
    """Prints a line that a process says at most once, however often it opens a set."""
    print(line, flush=True)
