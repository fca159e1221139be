"""The programs of the speech study's trainings, from shapes alone (`experiments.compiled`).

Of a streamed set the nets that see all of it are trained on its blocks.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from distill_jax import soft_targets, step_losses, train_step
from distill_jax.ahead import Blocks, Shapes
from distill_jax.models import parameter_count
from distill_jax.soft_targets.writer import BATCH_SIZE
from experiments.common import programs as common
from experiments.common.config import changed
from experiments.common.programs import Pass, Training, logits, shape, shapes_of
from experiments.common.training import build_model
from experiments.speech import frames, stream
from experiments.speech.data import Data, load_data
from experiments.speech.nets import WINDOWS, member_groups, member_logits

_SOFT = ("temperature", "hard_weight")


def programs(config: ConfigDict) -> Iterator[tuple[str, Training]]:
    """All trainings, each with its stage."""
    whole = _whole(load_data(config))["label"]
    for stage, one in _of_resident_sets(config):
        streamed = config.data.block_frames and one.fields["label"] == whole
        yield stage, _in_blocks(config, one) if streamed else one


def _of_resident_sets(config: ConfigDict) -> Iterator[tuple[str, Training]]:
    data, seeds = load_data(config), len(config.seeds)
    whole, net = _whole(data), config.distilled
    taught = {**whole, **_targets(config, data, _size(whole))}
    for name, members in member_groups(config):
        yield "ensemble", _training(data, name, config.ensemble, whole, len(members))
    yield "distilled", _training(data, "distilled", net, taught, seeds)
    if net.epochs != config.ensemble.epochs:
        as_long = changed(config.ensemble, epochs=net.epochs, report_every=1)
        yield "distilled", _training(data, "control", as_long, whole, 1)
    own = config.temperature
    for value in config.soft_targets.temperatures:
        if value != net.temperature or own.epochs not in (0, net.epochs):
            other = changed(net, epochs=own.epochs or net.epochs)
            name = f"temperature_{value:g}"
            yield "temperature", _training(data, name, other, taught, min(own.seeds, seeds))
    yield from _compression(config, data, whole)
    few = _part(whole, config.fractions.percent)
    few_taught = {**few, **_targets(config, data, _size(few))}
    each = tuple(name for name in few_taught if name != "frames") if seeds > 1 else ()
    part = _training(data, "part", config.fractions, few_taught, 2 * seeds)
    yield "fractions", part._replace(own=each)
    net = config.unlabelled
    yield "unlabelled", _training(data, "small", net, whole, net.seeds)
    for value, weight in ((1, 0), (net.temperature, 0), (net.temperature, net.hard_weight)):
        name = f"one_temperature_{value:g}_{weight:g}"
        yield "unlabelled", _training(data, name, net, taught, net.seeds)


def passes(config: ConfigDict) -> Iterator[tuple[str, Pass]]:
    """The batches of the ensemble's soft targets, and of one net's."""
    data = load_data(config)
    net = build_model(config.ensemble, data.num_classes, data.byte)
    windows = shape((BATCH_SIZE, frames.WINDOW, frames.FEATURES), np.uint8)
    for name, members in (("ensemble", len(config.ensemble.members)), ("one", 1)):
        params = common.frozen(net, windows, members)
        count = parameter_count(params)
        yield "soft_targets", Pass(name, member_logits, (net,), (params, windows), count)


def _compression(config: ConfigDict, data: Data, whole: Shapes) -> Iterator[tuple[str, Training]]:
    """Students of dense soft targets, of the k largest, and of classes drawn for as many bytes."""
    net, seeds, classes = config.compression, len(config.seeds), data.num_classes
    some = _part(whole, net.percent)
    dense = {**some, "teacher_logits": logits(_size(some), classes)}
    trained = _training(data, "dense/student", net, dense, seeds)
    yield "compression", trained._replace(loss=step_losses.distillation_loss)
    for k in net.k:
        if k < classes:
            kept = _top_k(classes, _size(some), k)
            yield "compression", _training(data, f"k_{k}/student", net, {**some, **kept}, seeds)
            size = sum(np.dtype(x.dtype).itemsize * (x.shape[1:] or (1,))[0] for x in kept.values())
            draws = soft_targets.most_draws(size, classes)
            kept = _drawn(classes, _size(some), draws)
            drawn = _training(data, f"draws_{draws}/student", net, {**some, **kept}, seeds)
            yield "compression", drawn._replace(own=("teacher_ids",) if seeds > 1 else ())


def _whole(data: Data) -> dict[str, Any]:
    """The fields of the training set."""
    return _packed(int(data.lengths.sum()), len(data.lengths))


def _packed(size: int, utterances: int) -> dict[str, Any]:
    """The fields of `frames.pack`, of so many examples."""
    rows = size + (frames.LEFT + frames.RIGHT) * utterances
    return {
        "frames": shape((rows, frames.FEATURES), np.uint8),
        **{name: shape((size,), np.int32) for name in ("id", "position", "label", "utterance")},
    }


def _in_blocks(config: ConfigDict, one: Training) -> Training:
    """The training on blocks of the set (`training_set`)."""
    lengths, batch_size = load_data(config).lengths, one.net.batch_size
    sizes = stream.block_sizes(lengths, config.data.block_frames)
    steps = stream.steps_per_block(lengths, config.data.block_frames, batch_size)
    more = {
        name: shape((sizes.most, *field.shape[1:]), field.dtype)
        for name, field in one.fields.items()
        if name != "frames"
    }
    return one._replace(
        fields={**more, **_packed(sizes.most, sizes.utterances), "count": shape((), np.int32)},
        blocks=Blocks(
            lambda step, shard: stream.make_block_epoch(step, batch_size, steps, shard),
            steps,
            shape((frames.WINDOW, frames.FEATURES), np.uint8),
        ),
    )


def _part(whole: Shapes, percent: float) -> dict[str, Any]:
    """Some of the examples, over the same frames."""
    size = max(1, round(percent / 100 * _size(whole)))
    return {
        name: field if name == "frames" else shape((size,), field.dtype)
        for name, field in whole.items()
    }


def _targets(config: ConfigDict, data: Data, size: int) -> dict[str, Any]:
    """The fields of stored soft targets."""
    own = config.soft_targets
    if own.encoding == "sampled":
        return _drawn(data.num_classes, size, own.k)
    return _top_k(data.num_classes, size, min(own.k, data.num_classes))


def _top_k(classes: int, size: int, k: int) -> dict[str, Any]:
    return {
        "teacher_ids": shape((size, k), _ids(classes)),
        "teacher_probabilities": shape((size, k), jnp.bfloat16),
        "teacher_tail": shape((size,), np.float32),
    }


def _drawn(classes: int, size: int, draws: int) -> dict[str, Any]:
    return {
        "teacher_ids": shape((size, draws), _ids(classes)),
        "teacher_probabilities": shape((size, 1), np.float32),
        "teacher_tail": shape((size,), np.float32),
    }


def _ids(classes: int) -> Any:
    return np.uint16 if classes <= 2**16 else np.uint32


def _size(fields: Shapes) -> int:
    return fields["label"].shape[0]


def _training(data: Data, name: str, net: ConfigDict, fields: Shapes, members: int) -> Training:
    """On labels, or on soft targets where the fields have some."""
    taught = any(field.startswith("teacher") for field in fields)
    return Training(
        name,
        net,
        build_model(net, data.num_classes, data.byte),
        _soft_loss(data.num_classes) if taught else step_losses.label_loss,
        fields,
        members,
        _SOFT if taught else (),
        reader=WINDOWS,
        evaluation={
            "test_errors": shapes_of(data.test),
            "validation_errors": shapes_of(data.validation),
        },
    )


@functools.cache
def _soft_loss(classes: int) -> train_step.Loss:
    """The same for all, so that programs that are alike are known to be."""
    return step_losses.top_k_distillation_loss(np.ones(classes, np.float32))
