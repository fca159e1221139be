"""The generalists of the specialist study, and what specialists are fed."""

import functools
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from distill_jax import models, nets, soft_targets, step_losses, train_step
from distill_jax.data import transfer
from distill_jax.data.images import Examples
from distill_jax.nets import Net
from experiments.common import training
from experiments.common.study import Context
from experiments.specialists.data import BYTE, Data, load_data, some_rows

CHUNK = 20_000  # examples whose features are in memory as float32


class Generalist(NamedTuple):
    """A generalist as its specialists see it.

    net: what they are a changed copy of: the head on features where the trunk is frozen, else the whole
    net. fingerprint: of the whole net. inputs: images -> what `net` takes.
    """

    net: Net
    fingerprint: str
    inputs: Callable[[np.ndarray], np.ndarray]


def trunk_of(net: ConfigDict) -> models.Model:
    """The convolutions of a config section."""
    return models.conv_trunk(net.channels, net.strides, scaling=BYTE, **_arithmetic(net))


def head_of(net: ConfigDict, outputs: int) -> models.Model:
    """The layers behind the convolutions, with so many outputs."""
    return models.mlp(
        net.hidden,
        outputs,
        hidden_dropout=net.hidden_dropout,
        output_scale=net.output_scale,
        **_arithmetic(net),
    )


def net_of(net: ConfigDict, outputs: int) -> models.Model:
    """The whole net."""
    return models.chain(trunk_of(net), head_of(net, outputs))


def _arithmetic(net: ConfigDict) -> dict[str, Any]:
    return {**training.arithmetic(net), "activation": models.ACTIVATIONS[net.activation]}


def train_generalists(context: Context) -> Net:
    """The generalists, one per seed."""
    examples = [load_data(context.config).train] * len(context.config.seeds)
    return train(context, "generalist", context.config.generalist, examples)


def train(
    context: Context,
    name: str,
    net: ConfigDict,
    examples: Sequence[Examples],
    *,
    loss: train_step.Loss = step_losses.label_loss,
    variant: Mapping[str, float] = types.MappingProxyType({}),
    start: models.Params | None = None,
) -> Net:
    """Trains whole nets, one per seed, in the stage's folder `name`; counts errors on all sets.

    In groups of `net.at_once` seeds as one program; each group is resumed by itself. The folder then
    holds the nets of all seeds, for `nets.load`.
    """
    data, config = load_data(context.config), context.config
    evaluation = {f"{split}_errors": part for split, part in data.evaluation().items()}
    parts, folders = [], []
    for folder, seeds in seed_groups(config, net):
        first = config.seeds.index(seeds[0])
        group = slice(first, first + len(seeds))
        folders.append(context.directory / name / folder)
        parts.append(
            training.train(
                config,
                net,
                net_of(net, data.num_classes),
                examples[group],
                loss,
                keys=context.keys(seeds),
                seeds=seeds,
                directory=folders[-1],
                name=name,
                variants=[variant],
                evaluation=evaluation,
                start=jax.tree.map(lambda leaf, group=group: leaf[group], start),
            )
        )
    records = zip(*(part.history for part in parts), strict=True)
    trained = nets.stack(parts)._replace(history=[_of_all_seeds(each) for each in records])
    about = {**trained.about, "config": {**trained.about["config"], "seeds": list(config.seeds)}}
    inputs = nets.load_inputs(folders[0])
    nets.save(
        context.directory / name, trained._replace(about=about), inputs=inputs, overwrite=True
    )
    return trained


def _of_all_seeds(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The groups' records of one report as one: all seeds' values, and what else is the same."""
    return {
        name: [x for one in records for x in one[name]] if isinstance(value, list) else value
        for name, value in records[0].items()
        if isinstance(value, list) or all(one[name] == value for one in records)
    }


def seed_groups(config: ConfigDict, net: ConfigDict) -> list[tuple[str, tuple[int, ...]]]:
    """The seeds that are trained as one program: a folder's name, and which."""
    groups = training.in_groups(tuple(config.seeds), net.at_once)
    return [(f"seeds_{own[0]}_to_{own[-1]}", own) for own in groups]


def accuracies(net: Net, data: Data) -> dict[str, np.ndarray]:
    """Accuracy after the last epoch of each member `[M]`, per cent, by the name of the set."""
    return {
        split: 100.0
        * (1.0 - np.asarray(net.history[-1][f"{split}_errors"], np.float64) / len(part["id"]))
        for split, part in data.evaluation().items()
    }


def load_all(context: Context) -> Net:
    """The finished generalists of the stage of that name, whole, one per seed; read once per process."""
    return _read(context.inputs["generalist"] / "generalist")


_read = functools.cache(nets.load)


def load(context: Context, seed: int) -> Generalist:
    """A seed's finished generalist as its specialists see it."""
    return as_specialists_see(context.config, load_all(context).member(seed))


def as_specialists_see(config: ConfigDict, whole: Net) -> Generalist:
    """A whole net, or its head alone and what makes features of images, if the trunk is frozen."""
    if not config.specialists.frozen_trunk:
        return Generalist(whole, whole.fingerprint, lambda images: images)
    head = head_of(config.generalist, whole.about["num_classes"])
    net = Net(head, models.head_params(whole.params), [], 0.0, None, {})
    inputs = functools.partial(_features, trunk_of(config.generalist), whole.params)
    return Generalist(net, whole.fingerprint, inputs)


def _features(trunk: models.Model, params: models.Params, images: np.ndarray) -> np.ndarray:
    """float16 `[N, D]`: half the room, and as exact as the images."""
    parts = [
        soft_targets.logits_over(trunk.apply, params, images[i : i + CHUNK]).astype(np.float16)
        for i in range(0, len(images), CHUNK)
    ]
    return np.concatenate(parts)


def specialist_part(config: ConfigDict) -> Examples:
    """The training examples that specialists are trained on: all, or a random part."""
    train = load_data(config).train
    return transfer.select(train, some_rows(config, len(train["id"]), config.specialists.examples))


def training_inputs(context: Context, seed: int) -> tuple[np.ndarray, float]:
    """`specialist_part` as a seed's specialists are fed it, and the seconds to make it.

    Made once per process.
    """
    key = context.inputs["generalist"], seed
    if key not in _INPUTS:
        generalist, images = load(context, seed), specialist_part(context.config)["inputs"]
        begun = time.monotonic()
        _INPUTS[key] = generalist.inputs(images), time.monotonic() - begun
    return _INPUTS[key]


_INPUTS: dict[tuple[Path, int], tuple[np.ndarray, float]] = {}
