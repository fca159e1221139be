"""The nets of the speech study: how they are trained and read, and their frame accuracies."""

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import evaluator, soft_targets, step_losses, train_step
from distill_jax.data.images import Examples
from distill_jax.models import Model, Params
from distill_jax.nets import Net, load, stack
from distill_jax.soft_targets import Mean
from distill_jax.trainer import PLAIN, Stream
from experiments.common import training
from experiments.common.study import Context
from experiments.speech import frames, training_set
from experiments.speech.data import Data, load_data

WINDOWS = PLAIN._replace(gather=frames.gather_windows, gather_evaluated=frames.gather_windows)
"""How frames are read: each with its window."""

_EVALUATED = 1024  # windows in memory at a time


def train(
    context: Context,
    name: str,
    net: ConfigDict,
    examples: Sequence[Examples] | Stream,
    loss: train_step.Loss,
    *,
    variants: Sequence[Mapping[str, float]] = ({},),
    seeds: Sequence[int] | None = None,
    directory: Path | None = None,
    number: int = 0,
) -> Net:
    """`training.train` for this study: counts frame errors on the test and validation sets.

    `number` is the training's in the stage's random keys.
    """
    config, data = context.config, load_data(context.config)
    seeds = tuple(seeds or config.seeds)
    return training.train(
        config,
        net,
        training.build_model(net, data.num_classes, data.byte),
        examples,
        loss,
        seeds=seeds,
        keys=context.keys(seeds, number),
        directory=(directory or context.directory) / name,
        name=name,
        variants=variants,
        evaluation={"test_errors": data.test, "validation_errors": data.validation},
        reader=WINDOWS,
    )


def distil(
    context: Context,
    name: str,
    net: ConfigDict,
    temperature: float,
    *,
    seeds: Sequence[int],
    hard_weight: float | None = None,
    store: str = "ensemble",
) -> Net:
    """Nets trained on stored soft targets of the whole training set; by default the ensemble's."""
    targets = load_targets(context.config, context.inputs["soft_targets"] / store)
    weight = net.hard_weight if hard_weight is None else hard_weight
    return train(
        context,
        name,
        net,
        training_set.with_targets(context.config, net, targets, temperature, len(seeds)),
        step_losses.top_k_distillation_loss(targets.tail_weights[temperature]),
        variants=[{"temperature": temperature, "hard_weight": weight}],
        seeds=seeds,
    )


def ensemble_groups(context: Context) -> list[Callable[[], Net]]:
    """What trains each group of the ensemble's members; each group is resumed by itself."""
    groups = member_groups(context.config)
    return [functools.partial(_train_group, context, name, seeds) for name, seeds in groups]


def load_ensemble(context: Context) -> Net:
    """The members of the finished stage "ensemble", read once per process."""
    names = tuple(name for name, _ in member_groups(context.config))
    return _load_ensemble(context.inputs["ensemble"], names)


def load_students(context: Context) -> Net:
    """The students of the finished stage "distilled"."""
    return load(context.inputs["distilled"] / "distilled")


@functools.cache
def _load_ensemble(folder: Path, names: tuple[str, ...]) -> Net:
    net = stack([load(folder / name) for name in names])
    return net._replace(params=jax.tree.map(jnp.asarray, net.params))


def member_groups(config: ConfigDict) -> list[tuple[str, tuple[int, ...]]]:
    """The ensemble's members by groups that are one program each: folders and seeds."""
    net = config.ensemble
    return [
        (f"member_{own[0]}" if len(own) == 1 else f"members_{own[0]}_to_{own[-1]}", own)
        for own in training.in_groups(tuple(net.members), net.at_once)
    ]


def _train_group(context: Context, name: str, seeds: tuple[int, ...]) -> Net:
    net = context.config.ensemble
    examples = training_set.labelled(context.config, net, len(seeds))
    return train(context, name, net, examples, step_losses.label_loss, seeds=seeds)


@functools.cache
def mean_log_probs(
    model: Model, temperature: float = 1.0, mean: Mean = "arithmetic"
) -> Callable[[Params, Array], Array]:
    """`(params [M, ...], windows [B, 26, 40]) -> [B, C]`: the members' mean at a temperature.

    The same function for the same arguments, so that it is compiled once.
    """

    def apply(params: Params, windows: Array) -> Array:
        # One member after another: all members' hidden layers side by side would be M times as large.
        logits = jax.lax.map(lambda member: model.apply(member, windows), params)
        return soft_targets.mean_log_probs(logits, jnp.float32(temperature), mean)

    return apply


def log_probs(net: Net, examples: Examples) -> np.ndarray:
    """The logarithm of the members' arithmetic mean `[N, C]`, of all examples, at temperature 1."""
    rows = np.arange(len(examples["label"]))
    return frames.logits_over_windows(mean_log_probs(net.model), net.params, examples, rows)


def accuracies(net: Net, examples: Examples) -> np.ndarray:
    """Frame accuracy of each member `[M]`, per cent."""
    shared = {name: jnp.asarray(field) for name, field in examples.items()}
    errors = evaluator.compile_errors(net.model, WINDOWS, _EVALUATED)(net.params, {}, shared)
    return 100.0 * (1.0 - np.asarray(errors) / known_frames(examples))


def states(net: Net, examples: Examples) -> list[np.ndarray]:
    """Each member's most probable state of all examples, int `[N]`."""
    each = (net.some(m, 1) for m in range(net.members or 1))
    return [log_probs(one, examples).argmax(axis=-1) for one in each]


def accuracy(states: np.ndarray, examples: Examples) -> float:
    """Frame accuracy of a state for each example `[N]`, per cent."""
    right = states == examples["label"]  # false for unknown labels
    return 100.0 * float(right.sum() / known_frames(examples))


def known_frames(examples: Examples) -> int:
    """How many frames have a label; accuracies are of these."""
    return int(np.count_nonzero(examples["label"] >= 0))


def write_targets(
    context: Context,
    name: str,
    net: Net,
    temperatures: Sequence[float],
    *,
    mean: Mean | None,
    teacher: str,
    shards: Sequence[int] | None = None,
) -> None:
    """Writes soft targets over the training set, or the rest of them, at all temperatures in one pass.

    The processes of a run share the shards out.

    Args:
        context: of the stage that keeps them.
        name: of the store's folder.
        net: the ensemble.
        temperatures: of the soft targets.
        mean: of the members; None for a single one.
        teacher: its fingerprint.
        shards: the numbers of those to write, of a store that is finished later; None: all of them.
    """
    config, data = context.config.soft_targets, load_data(context.config)

    def logits(rows: np.ndarray) -> Array:
        windows = training_set.windows(context.config, rows)
        members = member_logits(net.model, net.params, windows)
        return members[0] if mean is None else members

    begun = time.monotonic()

    def progress(done: int, size: int) -> None:
        rate = done / (time.monotonic() - begun)
        print(f"soft targets of {teacher}: {done}/{size} frames, {rate:.0f} a second", flush=True)

    soft_targets.write(
        context.directory / name,
        logits,
        training_set.digests(context.config),
        teacher=teacher,
        data={"alignment": data.fingerprint},
        encoding=config.encoding,
        k=config.k if config.encoding == "sampled" else min(config.k, data.num_classes),
        temperatures=temperatures,
        mean=mean,
        num_classes=data.num_classes,
        shard_rows=config.shard_rows,
        shards=shards,
        progress=progress,
    )


def shard_count(config: ConfigDict) -> int:
    """How many shards a store of soft targets over the training set has."""
    return math.ceil(load_data(config).lengths.sum() / config.soft_targets.shard_rows)


@functools.partial(jax.jit, static_argnums=0)
def member_logits(model: Model, params: Params, windows: Array) -> Array:
    """The logits of each member `[M, B, C]`, one member after the other."""
    return jax.lax.map(lambda member: model.apply(member, windows), params)


def load_targets(config: ConfigDict, directory: Path) -> soft_targets.Store:
    """A store, checked to be of this alignment and these classes."""
    data = load_data(config)
    return soft_targets.load(
        directory, data={"alignment": data.fingerprint}, num_classes=data.num_classes
    )


def fingerprint(net: Net, section: ConfigDict) -> str:
    """What names this teacher in a store."""
    return soft_targets.fingerprint(net.params, json.loads(section.to_json()))


def frame_accuracies(nets: Net, data: Data, split: str = "test") -> np.ndarray:
    """Frame accuracies of the members after the last epoch `[M]`, per cent."""
    examples = data.test if split == "test" else data.validation
    errors = np.asarray(nets.history[-1][f"{split}_errors"], np.float64)
    return 100.0 * (1.0 - errors / known_frames(examples))
