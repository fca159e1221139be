"""The generalists of the specialist study, and what specialists are fed."""

import functools
import json
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from distill_jax import models, soft_targets, train_step
from distill_jax.data import transfer
from distill_jax.data.images import Examples
from distill_jax.errors import UserError
from distill_jax.nets import stack as stack_nets
from experiments.common import members
from experiments.common.study import Context
from experiments.specialists.data import BYTE, Data, load_data

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}
_CHUNK = 20_000  # examples whose features are in memory as float32


class Base(NamedTuple):
    """A generalist as its specialists see it.

    model: what they are a changed copy of: the head on features where the trunk is frozen, else the
    whole net. params: the generalist's. fingerprint: names it. inputs: images -> what `model` takes.
    """

    model: models.Model
    params: models.Params
    fingerprint: str
    inputs: Callable[[np.ndarray], np.ndarray]

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """The generalist's logits `[N, C]` on `inputs`."""
        return soft_targets.logits_over(self.model.apply, self.params, inputs)


@functools.cache
def build_trunk(
    channels: tuple[int, ...], strides: tuple[int, ...], dtype: str, activation: str
) -> models.Model:
    """The convolutions of a config section; the same object for the same arguments."""
    return models.conv_trunk(
        channels,
        strides,
        dtype=members.DTYPES[dtype],
        scaling=BYTE,
        activation=ACTIVATIONS[activation],
    )


@functools.cache
def build_head(
    hidden: tuple[int, ...], outputs: int, dropout: float, dtype: str, activation: str, scale: float
) -> models.Model:
    """The layers behind the convolutions."""
    return models.mlp(
        hidden,
        outputs,
        hidden_dropout=dropout,
        dtype=members.DTYPES[dtype],
        activation=ACTIVATIONS[activation],
        output_scale=scale,
    )


def trunk_of(net: ConfigDict) -> models.Model:
    """The convolutions of a net."""
    _check(net)
    return build_trunk(tuple(net.channels), tuple(net.strides), net.dtype, net.activation)


def head_of(net: ConfigDict, outputs: int) -> models.Model:
    """The head of a net, with so many outputs."""
    _check(net)
    return build_head(
        tuple(net.hidden), outputs, net.hidden_dropout, net.dtype, net.activation, net.output_scale
    )


@functools.cache
def _whole(trunk: models.Model, head: models.Model) -> models.Model:
    return models.chain(trunk, head)


def net_of(net: ConfigDict, outputs: int) -> models.Model:
    """The whole net."""
    return _whole(trunk_of(net), head_of(net, outputs))


def train(
    context: Context,
    name: str,
    net: ConfigDict,
    examples: Sequence[Examples],
    loss: train_step.Loss,
    variant: Mapping[str, float] = types.MappingProxyType({}),
    start: models.Params | None = None,
    directory: Path | None = None,
) -> members.Net:
    """`members.train` of whole nets, one per seed; counts errors on all sets.

    In groups of `net.at_once` seeds as one program; each group is resumed by itself.
    """
    data, config = load_data(context.config), context.config
    if net.at_once < 1:
        raise UserError(f"generalist.at_once must be at least 1, not {net.at_once}")
    evaluation = {f"{split}_errors": part for split, part in data.evaluation().items()}
    parts = []
    for first in range(0, len(config.seeds), net.at_once):
        group = slice(first, first + net.at_once)
        seeds = tuple(config.seeds)[group]
        parts.append(
            members.train(
                net,
                ConfigDict({**config.to_dict(), "seeds": seeds}),
                (directory or context.directory) / name / f"seeds_{seeds[0]}_to_{seeds[-1]}",
                name,
                net_of(net, data.num_classes),
                examples[group],
                loss,
                [variant],
                evaluation,
                start=jax.tree.map(lambda leaf, group=group: leaf[group], start),
            )
        )
    return stack_nets(parts)


def train_generalists(context: Context, directory: Path | None = None) -> members.Net:
    """The generalists, one per seed; restored if they are done in `directory`."""
    data = load_data(context.config)
    examples = [data.train] * len(context.config.seeds)
    return train(
        context,
        "generalist",
        context.config.generalist,
        examples,
        train_step.label_loss,
        directory=directory,
    )


def load_bases(context: Context) -> list[Base]:
    """The finished generalists of the stage of that name, one per seed, restored once per process."""
    directory = context.inputs["generalist"]
    if directory not in _BASES:
        trained = train_generalists(context, directory)
        config = context.config
        _BASES[directory] = [
            _base(config, jax.tree.map(lambda leaf, s=s: leaf[s], trained.params))
            for s in range(len(config.seeds))
        ]
    return _BASES[directory]


_BASES: dict[Path, list[Base]] = {}


def load_generalists(context: Context) -> models.Params:
    """The whole nets' parameters, each leaf `[seeds, ...]`."""
    return train_generalists(context, context.inputs["generalist"]).params


def specialist_part(config: ConfigDict) -> Examples:
    """The training examples that specialists are trained on: all, or a random part."""
    train, size = load_data(config).train, config.specialists.examples
    random = np.random.default_rng(config.data.seed)
    return transfer.select(train, np.sort(random.permutation(len(train["id"]))[: size or None]))


def training_inputs(context: Context, seed: int) -> np.ndarray:
    """`specialist_part` as a seed's specialists are fed it; made once per process."""
    key = context.inputs["generalist"], seed
    if key not in _INPUTS:
        base = load_bases(context)[seed]
        begun = time.monotonic()
        made = base.inputs(specialist_part(context.config)["inputs"])
        _INPUTS[key] = made, time.monotonic() - begun
    return _INPUTS[key][0]


def inputs_seconds(context: Context, seed: int) -> float:
    """How long `training_inputs` took to make."""
    training_inputs(context, seed)
    return _INPUTS[context.inputs["generalist"], seed][1]


_INPUTS: dict[tuple[Path, int], tuple[np.ndarray, float]] = {}


def accuracies(nets: members.Net, data: Data) -> dict[str, np.ndarray]:
    """Accuracy after the last epoch of each member `[M]`, per cent, by the name of the set."""
    return {
        split: 100.0
        * (1.0 - np.asarray(nets.history[-1][f"{split}_errors"], np.float64) / len(part["id"]))
        for split, part in data.evaluation().items()
    }


def _base(config: ConfigDict, params: models.Params) -> Base:
    net, classes = config.generalist, load_data(config).num_classes
    name = soft_targets.fingerprint(params, json.loads(net.to_json()))
    if not config.specialists.frozen_trunk:
        return Base(net_of(net, classes), params, name, lambda images: images)
    inputs = functools.partial(_features, trunk_of(net), params)
    return Base(head_of(net, classes), models.head_params(params), name, inputs)


def _features(trunk: models.Model, params: models.Params, images: np.ndarray) -> np.ndarray:
    """float16 `[N, D]`: half the room, and as exact as the images."""
    parts = [
        soft_targets.logits_over(trunk.apply, params, images[i : i + _CHUNK]).astype(np.float16)
        for i in range(0, len(images), _CHUNK)
    ]
    return np.concatenate(parts)


def _check(net: ConfigDict) -> None:
    if net.activation not in ACTIVATIONS:
        raise UserError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, not {net.activation!r}"
        )
    members.dtype_of(net)


def stack(params: Sequence[models.Params]) -> models.Params:
    """Parameters of equal nets with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
