"""The data and the nets of the MNIST study, as its stages ask for them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from distill_jax import soft_targets, training
from distill_jax.data import sources, transfer
from distill_jax.data.sources import Examples
from distill_jax.errors import UserError
from experiments import members
from experiments.study import Context


class Data(NamedTuple):
    """The study's examples; `validation` is empty unless some are held out."""

    train: Examples
    validation: Examples
    test: Examples
    num_classes: int


def load_data(config: ConfigDict) -> Data:
    """The config's data, read once per process."""
    data = config.data
    return _load(
        data.source,
        data.data_dir,
        data.train_examples,
        data.test_examples,
        data.validation,
        data.seed,
    )


@functools.cache
def _load(name: str, data_dir: str, train: int, test: int, validation: int, seed: int) -> Data:
    source = sources.load(name, data_dir or None)
    first = _first(source.train, train, "data.train_examples")
    kept, held_out = transfer.hold_out(first, validation, seed)
    tested = _first(source.test, test, "data.test_examples")
    return Data(kept, held_out, tested, source.num_classes)


def _first(examples: Examples, count: int, key: str) -> Examples:
    """The first `count` examples; 0 stands for all."""
    size = len(examples["id"])
    if not 0 <= count <= size:
        raise UserError(f"{key} is {count}, but there are {size} examples")
    return transfer.select(examples, np.arange(count or size))


def train(
    context: Context,
    name: str,
    net: ConfigDict,
    examples: Sequence[Examples],
    loss: training.Loss,
    variants: Sequence[dict[str, float]] = ({},),
    passes: int = 1,
    directory: Path | None = None,
) -> members.Trained:
    """`members.train` for this study: counts errors on the test set and on what is held out."""
    data = load_data(context.config)
    evaluation = {"test_errors": data.test}
    if len(data.validation["id"]):
        evaluation["validation_errors"] = data.validation
    return members.train(
        net,
        context.config,
        (directory or context.directory) / name,
        name,
        members.build_model(net, data.num_classes),
        examples,
        loss,
        variants,
        evaluation,
        passes,
    )


def train_on_labels(
    context: Context, name: str, net: ConfigDict, directory: Path | None = None
) -> members.Trained:
    """Nets trained on the labels of the whole training set, or restored if they are."""
    examples = [load_data(context.config).train] * len(context.config.seeds)
    return train(context, name, net, examples, training.label_loss, directory=directory)


def with_soft_targets(
    context: Context, examples: Examples, temperature: float | None
) -> list[Examples]:
    """Every seed's examples, joined to the soft targets of that seed's teacher."""
    directory = context.inputs["soft_targets"]
    classes = load_data(context.config).num_classes
    stores = [
        soft_targets.load(directory / f"seed_{seed}", num_classes=classes)
        for seed in context.config.seeds
    ]
    return [soft_targets.attach(examples, store, temperature) for store in stores]
