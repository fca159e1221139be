"""The examples of the specialist study: distorted glyphs, or any image set."""

import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from distill_jax import files
from distill_jax.data import augment, images, transfer
from distill_jax.data.images import Examples
from distill_jax.errors import UserError
from experiments.common import image_sets, prepared
from experiments.common.config import IMAGE_SETS
from experiments.specialists import glyphs
from experiments.specialists.config import class_conflicts

BYTE = (40.0, 64.0)
"""(zero, unit) of a pixel: about the mean and the deviation of distorted glyphs."""


class Data(NamedTuple):
    """The study's examples.

    train: what nets learn from. seen: other examples of the typefaces in train; empty for other sets.
    validation, test: typefaces of their own. class_images: uint8 `[C, ...]`, a picture of each class.
    class_names: the characters, or numbers. fingerprint: of all of this and of the config of the data.
    """

    num_classes: int
    train: Examples
    seen: Examples
    validation: Examples
    test: Examples
    class_images: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str

    def evaluation(self) -> dict[str, Examples]:
        """The sets to measure accuracy on, by the name of its metric."""
        named = {"test": self.test, "seen": self.seen, "validation": self.validation}
        return {name: examples for name, examples in named.items() if len(examples["id"])}


def check_source(config: ConfigDict) -> str | None:
    """Names the content of the config's data; a UserError if they aren't there."""
    data = config.data
    if data.source.startswith(IMAGE_SETS):
        return image_sets.check_source(config)
    return files.content_of(prepared.find_set(glyphs.KIND, data.source))


def data_conflicts(config: ConfigDict) -> Iterator[str]:
    """What doesn't fit the number of classes of an image set."""
    data = config.data
    if data.source.startswith(IMAGE_SETS):
        found = image_sets.sizes(config)
        if data.classes > found.classes:
            yield f"data.classes is {data.classes}; allowed: 0 (all) to {found.classes}"
        yield from class_conflicts(config, data.classes or found.classes)


def load_data(config: ConfigDict) -> Data:
    """The config's data, made once per process."""
    data = config.data
    return _load(FrozenConfigDict(data))


def some_rows(config: ConfigDict, count: int, size: int) -> np.ndarray:
    """So many rows of a set, at random and in order, the same ones every time; all for a size of 0."""
    random = np.random.default_rng(config.data.seed)
    return np.sort(random.permutation(count)[: size or None])


def load_test(config: ConfigDict) -> Examples:
    """The test examples of glyphs alone, the same as `load_data` makes."""
    found = glyphs.load(config.data.source)
    _, splits = _first_classes(len(found.characters), dict(found.splits), config.data.classes)
    return _distorted(config.data, "test", splits["test"])


@functools.cache
def _load(data: FrozenConfigDict) -> Data:
    views, difficulty, seed = data.views, data.difficulty, data.seed
    if data.source.startswith(IMAGE_SETS):
        names, splits = _image_set(data)
        typical = splits["train"]
    else:
        found = glyphs.load(data.source)
        names, splits = found.characters, dict(found.splits)
        typical = _usual_typeface(splits["train"])
    num_classes, splits = _first_classes(len(names), splits, data.classes)
    digest = hashlib.sha256(repr((data.source, num_classes, views, difficulty, seed)).encode())
    for name, examples in splits.items():
        digest.update(name.encode() + examples["id"].tobytes() + examples["inputs"].tobytes())
    return Data(
        num_classes,
        **{name: _distorted(data, name, examples) for name, examples in splits.items()},
        class_images=_class_images([typical, splits["train"]], num_classes),
        class_names=names[:num_classes],
        fingerprint=digest.hexdigest()[:16],
    )


def _distorted(data: ConfigDict, split: str, examples: Examples) -> Examples:
    """The distorted views of a split; an image set has no examples that are seen."""
    if not len(examples["id"]):
        return examples
    # Held-out typefaces are few: two views of them make the accuracies steadier.
    count = {"train": data.views, "test": 1}.get(split, min(data.views, 2))
    return augment.views(examples, count, data.difficulty, data.seed)


def _image_set(data: FrozenConfigDict) -> tuple[tuple[str, ...], dict[str, Examples]]:
    """The names of the classes, and the splits."""
    found = images.load(data.source, **image_sets.how(data))
    size = len(found.train["id"])
    count = round(data.validation * size)
    if not 0 < count < size:
        raise UserError(
            f"data.validation is {data.validation}, which holds out {count} of {size} training "
            "examples; some must be held out, and some left"
        )
    train, held_out = transfer.hold_out(found.train, count, data.seed)
    gone = np.setdiff1d(held_out["label"], train["label"])
    if len(gone):
        raise UserError(
            f"data.validation is {data.validation}, which holds out all examples of class "
            f"{_names(found)[gone[0]]} ({len(gone)} such classes): bring more, leave the class out, or "
            "set data.seed to another number"
        )
    nothing = transfer.select(found.test, np.zeros(0, np.int64))
    return _names(found), {
        "train": train,
        "seen": nothing,
        "validation": held_out,
        "test": found.test,
    }


def _names(source: images.Source) -> tuple[str, ...]:
    return source.class_names or tuple(map(str, range(source.num_classes)))


def _first_classes(
    num_classes: int, splits: dict[str, Examples], classes: int
) -> tuple[int, dict[str, Examples]]:
    """The examples of the first classes; 0 stands for all."""
    if not 0 <= classes <= num_classes:
        raise UserError(f"data.classes is {classes}, but there are {num_classes} classes")
    kept = classes or num_classes
    return kept, {
        name: transfer.select(examples, examples["label"] < kept)
        for name, examples in splits.items()
    }


def _usual_typeface(train: Examples) -> Examples:
    """The examples of the typeface nearest to the mean of those that are all but complete."""
    faces, counts = np.unique(train["typeface"], return_counts=True)
    full = faces[counts >= 0.99 * counts.max()]
    means = [train["inputs"][train["typeface"] == face].mean(axis=0) for face in full]
    centre = np.mean(means, axis=0)
    distances = [np.square(mean - centre).sum() for mean in means]
    return transfer.select(train, train["typeface"] == full[int(np.argmin(distances))])


def _class_images(sets: list[Examples], num_classes: int) -> np.ndarray:
    """A picture of each class, of the first set that has one; black where none has."""
    pictures = np.zeros((num_classes, *sets[0]["inputs"].shape[1:]), np.uint8)
    for examples in reversed(sets):
        here = examples["label"] < num_classes
        # Reversed, so that a class's first example is what stays.
        pictures[examples["label"][here][::-1]] = examples["inputs"][here][::-1]
    return pictures
