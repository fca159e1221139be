"""The programs of the specialist study's trainings, from shapes alone (`experiments.compiled`).

How many examples a specialist's special classes have is not known before there are clusters: room is
left for all.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from distill_jax import models, step_losses
from distill_jax.ahead import Shapes
from distill_jax.specialists import eq5, heads, inference
from distill_jax.specialists.heads import Head
from experiments.common import programs as common
from experiments.common.config import changed
from experiments.common.programs import Pass, Training, logits, resized, shape, shapes_of
from experiments.common.training import in_groups
from experiments.specialists import distilled, generalists
from experiments.specialists.data import BYTE, Data, load_data
from experiments.specialists.mixture import mixture
from experiments.specialists.training import READER, build_network


def programs(config: ConfigDict) -> Iterator[tuple[str, Training]]:
    """All trainings, each with its stage. Those of other seeds are the same programs."""
    data = load_data(config)
    train, whole = shapes_of(data.train), config.generalist
    for name, seeds in generalists.seed_groups(config, whole):
        one = _generalist(data, "generalist", whole, train, len(seeds))
        yield "generalist", one._replace(name=f"generalist/{name}")
    for stage, name in (
        ("specialists", "specialists"),
        ("random", "random"),
        ("other_sets", "other"),
    ):
        if stage != "other_sets" or config.clusters.both_methods:
            yield from _specialists(config, data, stage, name)
    yield from _controls(config, data)
    yield from _mixtures(config, data)
    yield from _full_softmax(config, data)
    yield from _distilled(config, data)


def passes(config: ConfigDict) -> Iterator[tuple[str, Pass]]:
    """A trunk's features of images, if it is frozen; the generalist's logits; q of Eq. 5."""
    data = load_data(config)
    size = len(data.train["id"])
    if config.specialists.frozen_trunk:
        trunk = generalists.trunk_of(config.generalist)
        images = resized(shapes_of(data.train), min(generalists.CHUNK, size))["inputs"]
        params = common.frozen(trunk, images)
        yield "generalist", common.logits_over("features", trunk.apply, params, images)
    size = min(config.clusters.examples or size, config.specialists.examples or size, size)
    inputs, net = _fed(config, data, size)[0]["inputs"], build_network(config, data.num_classes)
    params = common.frozen(net, inputs)
    yield "clusters", common.logits_over("logits", net.apply, params, inputs)
    for one in _combined(config, data):
        yield "soft_targets", one


def _combined(config: ConfigDict, data: Data) -> Iterator[Pass]:
    """A specialist's logits, and Eq. 5 with as many specialists as could be active: all."""
    sizes, classes = config.clusters, data.num_classes
    head = heads.head_of(config.specialists.kind)
    fed, size = _fed(config, data, config.distilled.examples)
    net = build_network(config, head.outputs(sizes.size, classes))
    params = common.frozen(net, fed["inputs"])
    one = params, shape((sizes.size,), np.int32), shape((), np.float32)
    arrays: tuple[Any, ...] = one, resized(fed, inference.BATCH_SIZE)["inputs"]
    count = models.parameter_count(params)
    yield Pass("a specialist", inference.read_logits, (net.apply, head.read), arrays, count)
    rows, named = min(inference.ROWS, size), sizes.size if head.has_dustbin else classes
    evidence: tuple[Any, ...] = (
        logits(rows, classes),
        logits(rows, sizes.count, named + 1),
        shape((rows, sizes.count, named), np.int32),
        shape((rows, sizes.count), np.bool_),
    )
    arrays = inference.Evidence(*evidence), shape((), np.float32), shape((), np.int32)
    how = eq5.newton(), inference.BATCH_SIZE
    yield Pass("q of Eq. 5", inference.combine_batches, how, arrays, 0)


def _specialists(
    config: ConfigDict, data: Data, stage: str, name: str
) -> Iterator[tuple[str, Training]]:
    net, head = config.specialists, heads.head_of(config.specialists.kind)
    for group in in_groups(range(config.clusters.count), net.at_once):
        at = f"{name}/seed_{config.seeds[0]}/group_{group[0]:03d}"
        size = config.specialists.examples
        yield stage, _of_head(config, data, at, net=net, head=head, members=len(group), size=size)


def _full_softmax(config: ConfigDict, data: Data) -> Iterator[tuple[str, Training]]:
    own = config.soft
    for kind in own.kinds:
        head, net = heads.head_of(kind), changed(config.specialists, **own)
        at = f"{head.name}/seed_{config.seeds[0]}/group_000"
        count = min(own.count, config.clusters.count)
        size = own.examples or config.specialists.examples
        yield "soft", _of_head(config, data, at, net=net, head=head, members=count, size=size)


def _of_head(
    config: ConfigDict,
    data: Data,
    name: str,
    *,
    net: ConfigDict,
    head: Head,
    members: int,
    size: int,
) -> Training:
    """A group of specialists; on so many examples, or on all."""
    fields, size = _fed(config, data, size)
    fields = {
        "inputs": fields["inputs"],
        "label": shape((size,), np.int32),
        **{part: shape((size,), np.int32) for part in ("special", "other")},
        **{f"{part}_count": shape((), np.int32) for part in ("special", "other")},
    }
    generalist = build_network(config, data.num_classes)
    own = [name for name in fields if name not in ("inputs", "label")]
    return Training(
        name,
        changed(config.generalist, **net),
        build_network(config, head.outputs(config.clusters.size, data.num_classes)),
        head.loss,
        fields,
        members,
        ("temperature",),
        own if head != heads.UNIT else [*own, "label"],
        transforms=head.transforms(generalist),
        constants={
            "class_set": shape((config.clusters.size,), np.int32),
            "teacher": common.frozen(generalist, fields["inputs"]),
        },
        own_constants=("class_set",),
        reader=READER,
    )


def _controls(config: ConfigDict, data: Data) -> Iterator[tuple[str, Training]]:
    net = changed(config.generalist, **config.controls)
    train = shapes_of(data.train)
    for stage, name in (("longer", "longer"), ("ensemble", "second")):
        for group, seeds in generalists.seed_groups(config, net):
            yield stage, _generalist(data, f"{name}/{group}", net, train, len(seeds))


def _mixtures(config: ConfigDict, data: Data) -> Iterator[tuple[str, Training]]:
    count, classes, whole = config.clusters.count, data.num_classes, shapes_of(data.train)
    net = ConfigDict({**config.generalist.to_dict(), **config.mixture.to_dict()})
    fed, size = _fed(config, data, config.specialists.examples)
    head = mixture(generalists.head_of(net, classes), models.mlp([], count), count)
    gate = models.mlp([], count, scaling=BYTE)
    for name, epochs, model, inputs in (
        ("from_generalist", net.epochs, mixture(build_network(config, classes), gate, count), fed),
        ("from_scratch", net.scratch_epochs, models.chain(generalists.trunk_of(net), head), whole),
    ):
        if epochs:
            fields = {**resized(whole, size), "inputs": resized(inputs, size)["inputs"]}
            own = changed(net, epochs=epochs)
            at = f"{name}/seed_{config.seeds[0]}"
            yield "mixture", Training(at, own, model, step_losses.label_loss, fields, 1)


def _distilled(config: ConfigDict, data: Data) -> Iterator[tuple[str, Training]]:
    _, size = _fed(config, data, config.specialists.examples)
    size = min(config.distilled.examples or size, size)
    k = min(config.distilled.k, data.num_classes)
    train = resized(shapes_of(data.train), size)
    taught = {
        **train,
        "teacher_ids": shape((size, k), np.uint16),
        "teacher_probabilities": shape((size, k), jnp.bfloat16),
        "teacher_tail": shape((size,), np.float32),
    }
    loss = step_losses.top_k_distillation_loss()
    for name, epochs in (
        ("from_generalist", config.distilled.epochs),
        ("from_scratch", config.distilled.scratch_epochs),
    ):
        own = distilled.recipe(config, epochs)
        for group, seeds in generalists.seed_groups(config, own):
            one = _generalist(data, f"{name}/{group}", own, taught, len(seeds))
            targets = [field for field in taught if field not in train] if len(seeds) > 1 else []
            yield (
                "distilled",
                one._replace(
                    loss=loss,
                    numbers=("temperature", "hard_weight"),
                    own=targets,
                ),
            )
    if not distilled.has_control(config):
        net = distilled.recipe(config, config.distilled.epochs)
        for group, seeds in generalists.seed_groups(config, net):
            at = f"on_labels/{group}"
            yield "distilled", _generalist(data, at, net, train, len(seeds))


def _generalist(data: Data, name: str, net: ConfigDict, fields: Shapes, members: int) -> Training:
    """Whole nets, on labels."""
    model = generalists.net_of(net, data.num_classes)
    sets = {f"{name}_errors": shapes_of(part) for name, part in data.evaluation().items()}
    return Training(name, net, model, step_losses.label_loss, fields, members, evaluation=sets)


def _fed(config: ConfigDict, data: Data, size: int) -> tuple[dict[str, Any], int]:
    """What specialists are fed, of so many examples or all: features, if the trunk is frozen."""
    fields = shapes_of(data.train)
    size = min(size or len(data.train["id"]), len(data.train["id"]))
    if config.specialists.frozen_trunk:
        trunk = generalists.trunk_of(config.generalist)
        one = jax.eval_shape(_first_logits(trunk), resized(fields, 1)["inputs"])
        fields = {**fields, "inputs": shape((1, *one.shape[1:]), np.float16)}
    return resized(fields, size), size


def _first_logits(model: models.Model) -> Any:
    return lambda inputs: model.apply(model.init(jax.random.key(0), inputs), inputs)
