"""Trains the specialists of a generalist (sections 5.2 and 6.1), and asks them together (5.4)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import models, train_step
from distill_jax.data.images import Examples
from distill_jax.errors import UserError
from distill_jax.specialists import enrichment, inference, store
from experiments.common import members
from experiments.common.study import Context, read_json, write_json
from experiments.specialists import nets
from experiments.specialists.data import Data, load_data
from experiments.specialists.kinds import kind_of, make_gather
from experiments.specialists.nets import Base

_ROWS = 4096  # examples combined at a time


class Trained(NamedTuple):
    """K specialists of one generalist. seconds: that their training took, with
    the making of what they are fed."""

    specialists: store.Specialists
    seconds: float


def train(
    context: Context,
    name: str,
    seed: int,
    class_sets: np.ndarray,
    net: ConfigDict,
    kind: str,
) -> Trained:
    """Trains specialists of a seed's generalist, or reads them if they are done.

    In groups of `net.at_once` as the members of one program; each group is resumed by itself.

    Args:
        context: of the stage that keeps them, in the folder `name/seed_N`.
        name: of the folder.
        seed: the place of the generalist among the config's seeds.
        class_sets: int32 `[K, S]`.
        net: the config's section with their recipe; their sizes are the generalist's.
        kind: as for `kind_of`.

    Raises:
        UserError: for a class without examples, a set that leaves the dustbin none, an unknown kind, an
            odd batch size, or groups of none.
    """
    directory = _folder(context, name, seed)
    base, data = nets.load_bases(context)[seed], load_data(context.config)
    if (directory / "seconds.json").exists():
        found = load(directory, base, data)
        return Trained(found, read_json(directory / "seconds.json"))
    examples = enriched_examples(context, seed, class_sets)
    parts = [
        train_group(context, directory, seed, group, examples, net, kind)
        for group in _cut(len(class_sets), net)
    ]
    params = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[part.params for part in parts])
    meta = {
        "generalist": base.fingerprint,
        "data": data.fingerprint,
        "num_classes": data.num_classes,
        "kind": kind,
    }
    specialists = store.Specialists(params, class_sets, corrections(examples), meta)
    store.save(directory / "specialists", specialists)
    seconds = sum(part.seconds for part in parts) + nets.inputs_seconds(context, seed)
    write_json(directory / "seconds.json", seconds)
    return Trained(specialists, seconds)


def groups(
    context: Context,
    name: str,
    seed: int,
    class_sets: np.ndarray,
    net: ConfigDict,
    kind: str,
) -> list[Callable[[], members.Net]]:
    """What trains each group that `train` does, or restores it, by itself; arguments as there."""
    directory = _folder(context, name, seed)
    examples = functools.cache(lambda: enriched_examples(context, seed, class_sets))

    def train_one(group: range) -> members.Net:
        return train_group(context, directory, seed, group, examples(), net, kind)

    return [functools.partial(train_one, group) for group in _cut(len(class_sets), net)]


def _cut(count: int, net: ConfigDict) -> list[range]:
    if net.at_once < 1:
        raise UserError(f"specialists.at_once must be at least 1, not {net.at_once}")
    return [range(i, min(i + net.at_once, count)) for i in range(0, count, net.at_once)]


def _folder(context: Context, name: str, seed: int) -> Path:
    return context.directory / name / f"seed_{context.config.seeds[seed]}"


def load(directory: Path, base: Base, data: Data) -> store.Specialists:
    """Trained specialists, checked to be of this generalist and this data set."""
    return store.load(
        directory / "specialists",
        generalist=base.fingerprint,
        data=data.fingerprint,
        num_classes=data.num_classes,
    )


def load_stage(context: Context, seed: int) -> store.Specialists:
    """The specialists of a seed's generalist, from the stage of that name."""
    folder = context.inputs["specialists"] / "specialists" / f"seed_{context.config.seeds[seed]}"
    return load(folder, nets.load_bases(context)[seed], load_data(context.config))


def enriched_examples(context: Context, seed: int, class_sets: np.ndarray) -> list[dict[str, Any]]:
    """What each specialist is trained on: fields that all share, and rows and labels of its own."""
    data, base = load_data(context.config), nets.load_bases(context)[seed]
    part, classes = nets.specialist_part(context.config), data.num_classes
    labels = part["label"]
    rows = enrichment.stack_rows(
        [enrichment.enriched_rows(labels, class_set, classes) for class_set in class_sets]
    )
    shared = {
        "id": part["id"],
        "inputs": nets.training_inputs(context, seed),
        "label": labels,
        "generalist": base.params,
    }
    targets = np.asarray(jax.vmap(lambda s: enrichment.dustbin_labels(s, classes))(class_sets))
    return [
        {
            **shared,
            **{name: field[m] for name, field in rows.items()},
            "class_set": class_sets[m],
            "targets": targets[m],
        }
        for m in range(len(class_sets))
    ]


def corrections(examples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """What is added to each specialist's dustbin for its half/half batches: float32 `[K]`."""
    special, other = (
        np.array([one[f"{half}_count"] for one in examples]) for half in ("special", "other")
    )
    return np.asarray(enrichment.dustbin_correction(special, other))


def train_group(
    context: Context,
    directory: Path,
    seed: int,
    group: Sequence[int],
    examples: Sequence[Mapping[str, Any]],
    net: ConfigDict,
    kind: str,
    evaluation: Mapping[str, Sequence[Examples]] | None = None,
) -> members.Net:
    """Trains some of the specialists; each is the same whatever the group it is trained in."""
    if net.batch_size % 2:
        raise UserError(f"specialists.batch_size must be even to halve it, not {net.batch_size}")
    config, base, form = context.config, nets.load_bases(context)[seed], kind_of(kind)
    classes = load_data(config).num_classes
    own = [dict(examples[m]) for m in group]
    start = [form.start(base.params, jnp.asarray(e["class_set"]), classes) for e in own]
    numbers = tuple(1000 * config.seeds[seed] + m for m in group)
    print(f"specialists {group[0]} to {group[-1]} of {len(examples)}, seed {config.seeds[seed]}")
    # The name is part of the randomness, so it says nothing of the group.
    return members.train(
        ConfigDict({**config.generalist.to_dict(), **net.to_dict()}),
        ConfigDict({**config.to_dict(), "seeds": numbers, "selection": "last"}),
        directory / f"group_{group[0]:03d}",
        "specialist",
        network(config, base, kind, len(own[0]["class_set"]), classes),
        own,
        form.loss,
        [{"temperature": net.get("temperature", 1.0)}],
        evaluation or {},
        reader=members.Reader(
            make_gather(form, base.model),
            count_errors,
            enrichment.draw_enriched,
            lambda fields: 2 * fields["special"].shape[-1],
        ),
        start=nets.stack(start),
    )


def network(config: ConfigDict, base: Base, kind: str, size: int, classes: int) -> models.Model:
    """The specialists' network: the generalist's, with the outputs of its kind."""
    build = nets.head_of if config.specialists.frozen_trunk else nets.net_of
    return build(config.generalist, kind_of(kind).outputs(size, classes))


def count_errors(model: models.Model, params: models.Params, examples: train_step.Batch) -> Array:
    """Errors among the examples that are "counted" `[N]`.

    The prediction is the best of the outputs that are "allowed" `[outputs]`; it must be the "wanted" one
    `[N]`. No correction is needed where only outputs that share one are allowed.
    """
    logits = jnp.where(examples["allowed"], model.apply(params, examples["inputs"]), -jnp.inf)
    wrong = jnp.argmax(logits, axis=-1).astype(jnp.int32) != examples["wanted"]
    return jnp.sum(wrong & examples["counted"], dtype=jnp.int32)


def reader(config: ConfigDict, base: Base, specialists: store.Specialists) -> Any:
    """`(params, inputs) -> corrected logits`, with params as `reader_params` gives them."""
    kind = specialists.meta["kind"]
    size, classes = specialists.class_sets.shape[1], specialists.meta["num_classes"]
    model = network(config, base, kind, size, classes)

    def apply(params: models.Params, inputs: Array) -> Array:
        logits = model.apply(params["net"], inputs)
        return kind_of(kind).read(logits, params["class_set"], params["correction"])

    return apply


def reader_params(specialists: store.Specialists) -> models.Params:
    """All that a reader needs of each specialist, with a leading axis `[K]`."""
    return {
        "net": specialists.params,
        "class_set": np.asarray(specialists.class_sets),
        "correction": np.asarray(specialists.corrections),
    }


def gather_evidence(
    config: ConfigDict,
    base: Base,
    specialists: store.Specialists,
    inputs: np.ndarray,
    logits: np.ndarray,
    active_by: int,
) -> inference.Evidence:
    """What the generalist and its active specialists say of examples; `active_by` is the paper's n."""
    class_sets, classes = np.asarray(specialists.class_sets), logits.shape[1]
    if not 0 < active_by <= classes:
        raise UserError(f"specialists.active_by is {active_by}; expected 1 to {classes} classes")
    everything = np.tile(np.arange(classes, dtype=np.int32), (len(class_sets), 1))
    return inference.run_active(
        reader(config, base, specialists),
        reader_params(specialists),
        class_sets,
        logits,
        inputs,
        n=active_by,
        outputs=None if kind_of(specialists.meta["kind"]).has_dustbin else everything,
    )


def combined(
    config: ConfigDict,
    base: Base,
    specialists: store.Specialists,
    inputs: np.ndarray,
    active_by: int = 0,
) -> np.ndarray:
    """q of Eq. 5 for examples: float32 `[N, C]`; by the config's n, if no other is given."""
    n = active_by or config.specialists.active_by
    parts = []
    for start in range(0, len(inputs), _ROWS):
        part = inputs[start : start + _ROWS]
        evidence = gather_evidence(config, base, specialists, part, base.logits(part), n)
        parts.append(np.asarray(inference.combine(evidence)[0]))
    return np.concatenate(parts)
