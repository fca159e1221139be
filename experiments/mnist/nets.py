"""The data and the nets of the MNIST study, as its stages ask for them."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from distill_jax import sharding, soft_targets, train_step
from distill_jax.data import images, stream, transfer
from distill_jax.data.images import Examples
from distill_jax.data.stream import Block, Records
from distill_jax.errors import UserError
from experiments.common import members
from experiments.common.study import Context


class Data(NamedTuple):
    """The study's examples; `validation` is empty unless some are held out.

    `streamed` are the training examples if they are left on disk; `train` is empty then.
    """

    train: Examples
    validation: Examples
    test: Examples
    num_classes: int
    streamed: Records | None = None


def load_data(config: ConfigDict) -> Data:
    """The config's data in memory, read once per process."""
    return _load(*_what_to_load(config))


def open_data(config: ConfigDict) -> Data:
    """The same data, with the training examples left on disk if the config says so."""
    if not config.data.block_examples:
        return load_data(config)
    if not config.data.source.startswith("tfds:"):
        raise UserError(
            f"data.block_examples is {config.data.block_examples}, but only tfds: sources are "
            f"streamed: set it to 0 for {config.data.source}"
        )
    return _open(*_what_to_load(config))


def _what_to_load(config: ConfigDict) -> tuple[str, str, int, int, int, int]:
    data = config.data
    return (
        data.source,
        data.data_dir,
        data.train_examples,
        data.test_examples,
        data.validation,
        data.seed,
    )


@functools.cache
def _open(name: str, data_dir: str, train: int, test: int, validation: int, seed: int) -> Data:
    prepared = images.open_prepared(name, data_dir or None)
    source = stream.from_tfds(prepared)
    first = _first({"id": np.arange(source.size)}, train, "data.train_examples")
    kept, held_out = transfer.hold_out(first, validation, seed)
    tested = _first(images.read_test(prepared), test, "data.test_examples")
    streamed = stream.select(source, kept["id"])
    return Data({}, source.read(held_out["id"]), tested, prepared.num_classes, streamed)


@functools.cache
def _load(name: str, data_dir: str, train: int, test: int, validation: int, seed: int) -> Data:
    source = images.load(name, data_dir or None)
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
    examples: Sequence[Examples] | members.Stream,
    loss: train_step.Loss,
    variants: Sequence[dict[str, float]] = ({},),
    passes: int = 1,
    directory: Path | None = None,
) -> members.Net:
    """`members.train` for this study: counts errors on the test set and on what is held out."""
    data = open_data(context.config)
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
) -> members.Net:
    """Nets trained on the labels of the whole training set, or restored if they are."""
    data = open_data(context.config)
    examples: Sequence[Examples] | members.Stream = [data.train] * len(context.config.seeds)
    if data.streamed is not None:
        examples = _stream(context.config, net, data.streamed)
    return train(context, name, net, examples, train_step.label_loss, directory=directory)


def training_parts(config: ConfigDict) -> Iterator[Examples]:
    """The whole training set in order: in one part, or in such as are in memory one at a time."""
    data = open_data(config)
    if data.streamed is None:
        yield data.train
        return
    for start in range(0, data.streamed.size, config.data.block_examples):
        end = min(start + config.data.block_examples, data.streamed.size)
        yield data.streamed.read(np.arange(start, end))


def training_set_with_targets(
    context: Context, net: ConfigDict
) -> Sequence[Examples] | members.Stream:
    """The whole training set, joined to the soft targets of every seed's teacher."""
    data = open_data(context.config)
    if data.streamed is None:
        return with_soft_targets(context, data.train, net.temperature)
    stores, source = _stores(context), data.streamed

    def read(numbers: np.ndarray) -> Examples:
        examples = source.read(numbers)
        joined = [soft_targets.attach(examples, store, net.temperature) for store in stores]
        logits = np.stack([one["teacher_logits"] for one in joined], axis=1)
        return {**examples, "teacher_logits": logits}

    return _stream(context.config, net, Records(source.size, read), own=("teacher_logits",))


def with_soft_targets(
    context: Context, examples: Examples, temperature: float | None
) -> list[Examples]:
    """Every seed's examples, joined to the soft targets of that seed's teacher."""
    return [soft_targets.attach(examples, store, temperature) for store in _stores(context)]


def _stores(context: Context) -> list[soft_targets.SoftTargets]:
    directory = context.inputs["soft_targets"]
    classes = open_data(context.config).num_classes
    return [
        soft_targets.load(directory / f"seed_{seed}", num_classes=classes)
        for seed in context.config.seeds
    ]


def _stream(
    config: ConfigDict, net: ConfigDict, source: Records, own: Sequence[str] = ()
) -> members.Stream:
    """The examples as a stream; fields `own` are `[n, M, ...]`, a member's each."""
    size, seed = config.data.block_examples, config.data.seed
    rows = sharding.own_rows(sharding.make_mesh(**config.mesh), net.batch_size)
    cut = stream.cut(source.size, net.batch_size, size)
    one = source.read(np.arange(1))

    def put(block: Block, mesh: Any) -> train_step.Batch:
        shared = {name: field for name, field in block.items() if name not in own}
        members_first = {name: np.moveaxis(block[name], 2, 0) for name in own}
        return sharding.put_rows(shared, mesh, 1) | sharding.put_rows(members_first, mesh, 2)

    return members.Stream(
        lambda first: stream.blocks(source, net.batch_size, size, seed, rows, first_block=first),
        cut.steps,
        cut.blocks,
        jax.ShapeDtypeStruct(one["inputs"].shape[1:], one["inputs"].dtype),
        put,
        {name: name in own for name in one},
        stream.make_block_epoch,
    )
