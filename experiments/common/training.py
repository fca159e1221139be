"""Trains the nets of a study from its config: all seeds, times all variants, as one program."""

import functools
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from distill_jax import models, optimizers, ramps, sharding, train_step, trainer
from distill_jax.data.augment import jitter
from distill_jax.data.images import Examples
from distill_jax.errors import UserError
from distill_jax.nets import Net
from distill_jax.trainer import PLAIN, Reader, Recipe, Stream


def train(
    config: ConfigDict,
    net: ConfigDict,
    model: models.Model,
    examples: Sequence[Examples] | Stream,
    loss: train_step.Loss,
    *,
    keys: Array,
    directory: Path,
    name: str,
    seeds: Sequence[int] | None = None,
    variants: Sequence[Mapping[str, Any]] = ({},),
    evaluation: Mapping[str, Examples | Sequence[Examples]] = types.MappingProxyType({}),
    passes: int = 1,
    transforms: Sequence[train_step.Transform] = (),
    reader: Reader = PLAIN,
    start: models.Params | None = None,
) -> Net:
    """Trains one net per variant and seed as one vmapped program, or reads them if they are finished.

    Args:
        config: of the study: its seeds, selection, mesh and data.
        net: the config's section with sizes and recipe.
        model: from `build_model`.
        examples: each seed's own; or a stream.
        loss: of `distill_jax.train_step`.
        keys: one for each seed (`study.Context.keys`); a seed's variants share theirs.
        directory: this training's own.
        name: shown in progress.
        seeds: where they are others than the config's.
        variants: further traced numbers per net ("temperature", "hard_weight", "learning_rate"), or
            their ramps (`config.at`). Member `v * len(keys) + s` is variant v of seed s.
        evaluation: sets to count errors on.
        passes: epochs over small examples for each of the net's epochs.
        transforms: of each batch, before those of the section.
        reader, start: as for `trainer.train`.
    """
    count = len(variants)
    if not isinstance(examples, Stream):
        examples = [*examples] * count
    return trainer.train(
        directory,
        model,
        examples,
        loss,
        make_recipe(net, passes, transforms),
        keys=jnp.concatenate([keys] * count),
        hyper=_hyper(net, variants, len(keys)),
        evaluation=evaluation,
        reader=reader,
        start=start,
        mesh=sharding.make_mesh(**config.mesh),
        selection=config.selection,
        name=name,
        config={
            "data": config.get("data", ConfigDict()).to_dict(),
            "net": json.loads(net.to_json()),
            "seeds": list(seeds or config.seeds),
            "variants": [dict(variant) for variant in variants],
        },
    )


def make_recipe(
    net: ConfigDict, passes: int = 1, transforms: Sequence[train_step.Transform] = ()
) -> Recipe:
    """How the net of a config section is trained."""
    return Recipe(
        epochs=net.epochs * passes,
        batch_size=net.batch_size,
        optimizer=functools.partial(build_optimizer, net),
        transforms=[*transforms, *([jitter(net.jitter)] if net.jitter else [])],
        micro_batches=net.micro_batches,
        fused_logits=net.fused_logits,
        report_every=net.report_every * passes,
        save_every=net.save_every,
    )


def in_groups(members: Any, at_once: int) -> list[Any]:
    """A sequence cut into those that are trained as one program; the last may be shorter.

    Examples:
        >>> in_groups((0, 1, 2), 2), in_groups(range(3), 2)
        ([(0, 1), (2,)], [range(0, 2), range(2, 3)])
    """
    return [members[first : first + at_once] for first in range(0, len(members), at_once)]


def curve(history: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A training's history as columns: "epoch", "train_loss" and what else was measured."""
    names = [name for name in history[-1] if name not in ("unit", "seconds", "step")]
    return {name: [record[name] for record in history] for name in names}


def build_model(
    net: ConfigDict, num_classes: int, scaling: tuple[float, float] = (0.0, 255.0)
) -> models.Model:
    """The net of a config section; `scaling` as for `models.mlp`."""
    scale = net.get("init_scale", 1.0)  # not every section has one
    return models.mlp(
        net.hidden,
        num_classes,
        input_dropout=net.input_dropout,
        hidden_dropout=net.hidden_dropout,
        **arithmetic(net),
        scaling=scaling,
        output_scale=scale,
        hidden_scale=scale,
    )


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def arithmetic(net: ConfigDict) -> dict[str, Any]:
    """The dtypes of a config section, as the models of `distill_jax.models` take them."""
    return {"dtype": DTYPES[net.dtype], "gradient_dtype": DTYPES[net.gradient_dtype]}


def build_optimizer(
    net: ConfigDict, steps: int, epochs: int
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config section, for `epochs` of `steps` each."""
    schedule = optimizers.cosine(steps * epochs, min(net.warmup_epochs, epochs // 2) * steps)
    if net.optimizer == "adam":
        return optimizers.adam(schedule, net.max_norm)
    if net.optimizer == "sgd":
        return optimizers.sgd(schedule, net.momentum, net.max_norm)
    if net.optimizer == "dropout_2012":
        return optimizers.dropout_2012(steps, net.max_norm)
    raise UserError(f"optimizer must be adam, sgd or dropout_2012, not {net.optimizer!r}")


def _hyper(net: ConfigDict, variants: Sequence[Mapping[str, Any]], seeds: int) -> dict[str, Any]:
    """Traced numbers `[M]`, or ramps of such: the section's own, where a variant has none."""
    names = {"learning_rate", *(key for variant in variants for key in variant)}
    values = {name: [variant.get(name, net.get(name)) for variant in variants] for name in names}
    return {name: _repeat(each, seeds) for name, each in values.items()}


def _repeat(values: Sequence[Any], seeds: int) -> Any:
    if not any(isinstance(value, Mapping) for value in values):
        return np.repeat(values, seeds)
    each = [x if isinstance(x, Mapping) else {"from": x, "to": x, "steps": 1} for x in values]
    return {part: np.repeat([ramp[part] for ramp in each], seeds) for part in ramps.RAMP}
