"""The MNIST study's examples: resident or streamed, alone or with the teachers' soft targets."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from distill_jax import sharding, soft_targets, train_step
from distill_jax.data import images, records, stream, transfer
from distill_jax.data.images import Examples
from distill_jax.data.records import Records
from distill_jax.data.stream import Block
from distill_jax.trainer import Stream
from experiments.common import image_sets
from experiments.common.config import is_brought
from experiments.common.study import Context
from experiments.mnist.config import size_conflicts


class Data(NamedTuple):
    """The study's examples; `validation` is empty unless some are held out.

    `streamed` are the training examples if they are left on disk; `train` is empty then. class_names:
    empty where they aren't known.
    """

    train: Examples
    validation: Examples
    test: Examples
    num_classes: int
    class_names: tuple[str, ...]
    streamed: Records | None = None


def data_conflicts(config: ConfigDict) -> Iterator[str]:
    """What doesn't fit the size of a set that a person brings."""
    if is_brought(config.data.source):
        found = image_sets.sizes(config)
        yield from image_sets.size_conflicts(config, found)
        yield from size_conflicts(config, config.data.train_examples or found.train)


def load_data(config: ConfigDict) -> Data:
    """The config's data in memory, read once per process."""
    return _load(FrozenConfigDict(config.data))


def open_data(config: ConfigDict) -> Data:
    """The same data, with the training examples left on disk if the config says so."""
    if not config.data.block_examples:
        return load_data(config)
    return _open(FrozenConfigDict(config.data))


@functools.cache
def _load(data: FrozenConfigDict) -> Data:
    source = image_sets.load(data)
    kept, held_out = transfer.hold_out(source.train, data.validation, data.seed)
    return Data(kept, held_out, source.test, source.num_classes, source.class_names)


@functools.cache
def _open(data: FrozenConfigDict) -> Data:
    source = images.open_set(data.source, **image_sets.how(data))
    numbers = {"id": np.arange(source.train.size)}
    first = image_sets.first(numbers, data.train_examples, "data.train_examples")
    kept, held_out = transfer.hold_out(first, data.validation, data.seed)
    tested = image_sets.first(
        records.read_all(source.test), data.test_examples, "data.test_examples"
    )
    streamed = records.select(source.train, kept["id"])
    validation = source.train.read(held_out["id"])
    return Data({}, validation, tested, source.num_classes, source.class_names, streamed)


def training_set(config: ConfigDict, net: ConfigDict) -> Sequence[Examples] | Stream:
    """The whole training set for every seed, with labels."""
    data = open_data(config)
    if data.streamed is not None:
        return _stream(config, net, data.streamed)
    return [data.train] * len(config.seeds)


def training_parts(config: ConfigDict) -> Iterator[Examples]:
    """The whole training set in order: in one part, or in parts that are in memory one at a time."""
    data = open_data(config)
    if data.streamed is None:
        yield data.train
        return
    for start in range(0, data.streamed.size, config.data.block_examples):
        end = min(start + config.data.block_examples, data.streamed.size)
        yield data.streamed.read(np.arange(start, end))


def training_set_with_targets(context: Context, net: ConfigDict) -> Sequence[Examples] | Stream:
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


def _stores(context: Context) -> list[soft_targets.Store]:
    directory = context.inputs["soft_targets"]
    classes = open_data(context.config).num_classes
    return [
        soft_targets.load(directory / f"seed_{seed}", num_classes=classes)
        for seed in context.config.seeds
    ]


def _stream(
    config: ConfigDict, net: ConfigDict, source: Records, own: Sequence[str] = ()
) -> Stream:
    """The examples as a stream; fields `own` are `[n, M, ...]`, each member's own."""
    size, seed = config.data.block_examples, config.data.seed
    rows = sharding.own_rows(sharding.make_mesh(**config.mesh), net.batch_size)
    cut = stream.cut(source.size, net.batch_size, size)
    one = source.read(np.arange(1))

    def put(block: Block, mesh: Any) -> train_step.Batch:
        shared = {name: field for name, field in block.items() if name not in own}
        members_first = {name: np.moveaxis(block[name], 2, 0) for name in own}
        return sharding.put_rows(shared, mesh, 1) | sharding.put_rows(members_first, mesh, 2)

    return Stream(
        lambda first: stream.blocks(source, net.batch_size, size, seed, rows, first_block=first),
        cut.steps,
        cut.blocks,
        jax.ShapeDtypeStruct(one["inputs"].shape[1:], one["inputs"].dtype),
        put,
        {name: name in own for name in one},
        stream.make_block_epoch,
    )
