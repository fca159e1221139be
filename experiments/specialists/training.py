"""Trains the specialists of a generalist (sections 5.2 and 6.1), and asks them together (5.4)."""

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import models, nets, sharding, train_step, trainer
from distill_jax.batches import rows_of
from distill_jax.data.images import Examples
from distill_jax.nets import Net
from distill_jax.specialists import enrichment, heads, inference, store
from distill_jax.specialists.heads import Head
from experiments.common.config import changed
from experiments.common.study import Context
from experiments.common.training import in_groups, make_recipe
from experiments.specialists import generalists
from experiments.specialists.data import load_data, some_rows
from experiments.specialists.generalists import Generalist


def train(context: Context, name: str, seed: int, class_sets: np.ndarray) -> store.Specialists:
    """Trains specialists of a seed's generalist, or reads them if they are done.

    In groups of `specialists.at_once` as the members of one program; each group is resumed by itself.

    Args:
        context: of the stage that keeps them, in the folder `name/seed_N`.
        name: of the folder.
        seed: the place of the generalist among the config's seeds.
        class_sets: int32 `[K, S]`.

    Returns:
        The specialists; their net's seconds count the making of what they are fed, too.

    Raises:
        UserError: for a class without examples, or a set that leaves the dustbin none.
    """
    directory = _folder(context, name, seed)
    if (directory / "specialists").exists():
        return load(context, directory, seed)
    head = heads.head_of(context.config.specialists.kind)
    enriched = make_enriched(context, seed, class_sets, head)
    parts = [
        _train_own(context, directory, seed, enriched, group)
        for group in in_groups(range(len(class_sets)), context.config.specialists.at_once)
    ]
    seconds = sum(part.seconds for part in parts) + generalists.training_inputs(context, seed)[1]
    data = load_data(context.config)
    specialists = store.Specialists(
        nets.stack(parts)._replace(seconds=seconds),
        head,
        class_sets,
        enriched.corrections,
        data.num_classes,
        generalist=generalists.load(context, seed).fingerprint,
        data=data.fingerprint,
    )
    store.save(directory / "specialists", specialists)
    return specialists


def groups(
    context: Context, name: str, seed: int, class_sets: np.ndarray
) -> list[Callable[[], Net]]:
    """What trains each group that `train` does, or reads it, by itself; arguments as there."""
    directory = _folder(context, name, seed)
    head = heads.head_of(context.config.specialists.kind)
    enriched = functools.cache(lambda: make_enriched(context, seed, class_sets, head))

    def train_one(group: range) -> Net:
        return _train_own(context, directory, seed, enriched(), group)

    cut = in_groups(range(len(class_sets)), context.config.specialists.at_once)
    return [functools.partial(train_one, group) for group in cut]


def _folder(context: Context, name: str, seed: int) -> Path:
    return context.directory / name / f"seed_{context.config.seeds[seed]}"


def load(context: Context, directory: Path, seed: int) -> store.Specialists:
    """Trained specialists, checked to be of a seed's generalist and of this data set."""
    data = load_data(context.config)
    return store.load(
        directory / "specialists",
        generalist=generalists.load(context, seed).fingerprint,
        data=data.fingerprint,
        num_classes=data.num_classes,
    )


def load_stage(context: Context, seed: int) -> store.Specialists:
    """The specialists of a seed's generalist, from the stage of that name."""
    folder = context.inputs["specialists"] / "specialists" / f"seed_{context.config.seeds[seed]}"
    return load(context, folder, seed)


def make_enriched(
    context: Context, seed: int, class_sets: np.ndarray, head: Head, size: int = 0
) -> enrichment.Enriched:
    """What the specialists of a seed's generalist are trained on: all, or `size` at random."""
    part = generalists.specialist_part(context.config)
    inputs, _ = generalists.training_inputs(context, seed)
    rows = some_rows(context.config, len(inputs), size)
    return enrichment.enrich(
        {"inputs": inputs[rows] if size else inputs, "label": part["label"][rows]},
        class_sets,
        load_data(context.config).num_classes,
        head=head,
        generalist=generalists.load(context, seed).net.params,
    )


def _train_own(
    context: Context, directory: Path, seed: int, enriched: enrichment.Enriched, group: range
) -> Net:
    """Trains some of the specialists of the config's section, or reads them."""
    net = context.config.specialists
    return train_group(
        context, directory, seed, enriched, group, net=net, head=heads.head_of(net.kind)
    )


def train_group(
    context: Context,
    directory: Path,
    seed: int,
    enriched: enrichment.Enriched,
    group: range,
    *,
    net: ConfigDict,
    head: Head,
    evaluation: Mapping[str, Sequence[Examples]] = types.MappingProxyType({}),
) -> Net:
    """Trains some of the specialists, or reads them; each is the same in whatever group it is trained.

    Args:
        context: of the stage.
        directory: of this generalist's specialists.
        seed: the place of the generalist among the config's seeds.
        enriched: of all its specialists.
        group: which of them.
        net: the config's section with their recipe; their sizes are the generalist's.
        head: of all.
        evaluation: what to count errors on (`count_errors`), of each member its own.
    """
    config, generalist = context.config, generalists.load(context, seed)
    classes = load_data(config).num_classes
    constants = [enriched.constants[m] for m in group]
    sets = jnp.asarray(np.stack([one["class_set"] for one in constants]))
    section = changed(config.generalist, **net)
    numbers = [1000 * config.seeds[seed] + m for m in group]
    last = len(enriched.examples)
    print(f"specialists {group[0]} to {group[-1]} of {last}, seed {config.seeds[seed]}")
    return trainer.train(
        directory / f"group_{group[0]:03d}",
        build_network(config, head.outputs(sets.shape[1], classes)),
        [enriched.examples[m] for m in group],
        head.loss,
        dataclasses.replace(make_recipe(section), transforms=head.transforms(generalist.net.model)),
        # Of each specialist's place among all, whatever the group.
        keys=jax.vmap(jax.random.fold_in, (None, 0))(
            context.keys([config.seeds[seed]])[0], jnp.asarray(group, jnp.uint32)
        ),
        hyper={"learning_rate": net.learning_rate, "temperature": net.get("temperature", 1.0)},
        constants=constants,
        evaluation=evaluation,
        reader=READER,
        start=jax.vmap(lambda own: head.start(generalist.net.params, own, classes))(sets),
        mesh=sharding.make_mesh(**config.mesh),
        name="specialist",
        config={
            "data": json.loads(config.data.to_json()),
            "net": json.loads(section.to_json()),
            "head": head.name,
            "seeds": numbers,
        },
    )


def build_network(config: ConfigDict, outputs: int) -> models.Model:
    """The specialists' network: the generalist's, with so many outputs."""
    build = generalists.head_of if config.specialists.frozen_trunk else generalists.net_of
    return build(config.generalist, outputs)


def count_errors(model: models.Model, params: models.Params, examples: train_step.Batch) -> Array:
    """Errors among the examples that are "counted" `[N]`.

    The prediction is the best of the outputs that are "allowed" `[outputs]`; it must be the "wanted" one
    `[N]`. No correction is needed where only outputs that share one are allowed.
    """
    logits = jnp.where(examples["allowed"], model.apply(params, examples["inputs"]), -jnp.inf)
    wrong = jnp.argmax(logits, axis=-1).astype(jnp.int32) != examples["wanted"]
    return jnp.sum(wrong & examples["counted"], dtype=jnp.int32)


def take_counted(examples: train_step.Batch, rows: Array) -> train_step.Batch:
    """A batch for `count_errors`; "allowed" is of the outputs, all else of the examples."""
    return {
        name: field if name == "allowed" else rows_of(field, rows)
        for name, field in examples.items()
    }


READER = enrichment.READER._replace(count_errors=count_errors, gather_evaluated=take_counted)
"""How specialists' examples are read, and their errors counted while they learn."""


def predict(
    config: ConfigDict, generalist: Generalist, specialists: store.Specialists, inputs: np.ndarray
) -> np.ndarray:
    """q of Eq. 5 for examples: float32 `[N, C]`; by the config's n."""
    n = config.specialists.active_by
    return inference.predict(specialists, generalist.net.logits(inputs), inputs, n=n)
