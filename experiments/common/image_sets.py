"""Image sets as studies read them: what the section `data` of a config says."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from distill_jax.data import images, transfer
from distill_jax.data.images import Examples, Source
from distill_jax.errors import UserError


def load(data: ConfigDict | FrozenConfigDict) -> Source:
    """The set, or the first so many of its examples."""
    source = images.load(data.source, **how(data))
    return source._replace(
        train=first(source.train, data.train_examples, "data.train_examples"),
        test=first(source.test, data.test_examples, "data.test_examples"),
    )


def check_source(config: ConfigDict) -> str | None:
    """Names the content of the config's set, if it may change; a UserError if it isn't there."""
    return images.check_source(config.data.source, **_where(config.data))


def sizes(config: ConfigDict) -> images.Counts:
    """How large the config's set is."""
    return images.count(config.data.source, **_where(config.data))


def data_conflicts(config: ConfigDict) -> Iterator[str]:
    """More examples than the set has, and batches that are larger than it."""
    found, data = sizes(config), config.data
    yield from size_conflicts(config, found)
    size = data.train_examples or found.train
    for name, section in config.items():
        if isinstance(section, ConfigDict) and section.get("batch_size", 0) > size:
            batch = section.batch_size
            yield f"{name}.batch_size is {batch}, but it is trained on {size} examples"


def size_conflicts(config: ConfigDict, found: images.Counts) -> Iterator[str]:
    """More examples than there are."""
    data = config.data
    for name, size in (("train_examples", found.train), ("test_examples", found.test)):
        if data[name] > size:
            yield f"data.{name} is {data[name]}; allowed: 0 (all) to {size}, as there are so many"


def how(data: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """What `images.load` takes beside the source's name."""
    return {**_where(data), "side": data.side}


def _where(data: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    return {
        "data_dir": data.data_dir or None,
        "test_share": data.test_share,
        "seed": data.seed,
    }


def first(examples: Examples, count: int, key: str) -> Examples:
    """The first `count` examples; 0 stands for all.

    Raises:
        UserError: that names the config's key, if there are not so many, or the first ones lack classes
            because the set is ordered.
    """
    size = len(examples["id"])
    if not 0 <= count <= size:
        raise UserError(f"{key} is {count}, but there are {size} examples")
    first = transfer.select(examples, np.arange(count or size))
    if "label" in first and 0 < count < size:
        labels = examples["label"]
        classes = len(np.unique(labels))
        grouped = np.count_nonzero(np.diff(labels)) == classes - 1
        if grouped and len(np.unique(first["label"])) < classes:
            raise UserError(
                f"{key} is {count}, but the set is ordered by class, and its first {count} examples are "
                f"not of all {classes}: set it to 0 (all), or write the set in a mixed order"
            )
    return first
