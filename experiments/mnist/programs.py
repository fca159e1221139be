"""The programs of the MNIST study's trainings, from shapes alone (`experiments.compiled`)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from distill_jax import step_losses, train_step
from distill_jax.ahead import Blocks, Shapes
from distill_jax.data import augment, stream
from experiments.common import programs as common
from experiments.common.config import changed
from experiments.common.programs import Pass, Training, logits, resized, shape, shapes_of
from experiments.common.training import build_model
from experiments.mnist.data import Data, load_data, open_data
from experiments.mnist.objectives import OBJECTIVES
from experiments.mnist.transfer_sets import OMISSIONS
from experiments.mnist.views import distortions, mean_logits, new_distortions

_SOFT = ("temperature", "hard_weight")
_TARGETS = "teacher_logits"


def programs(config: ConfigDict) -> Iterator[tuple[str, Training]]:
    """All trainings, each with its stage; of a set that is left on disk, those that stream it."""
    listed = _in_blocks if config.data.block_examples else _of_several_seeds
    for stage, one in listed(config):
        # What is each seed's own is shared where there is one, but in blocks.
        shared = len(config.seeds) == 1 and not one.blocks
        yield stage, one._replace(own=()) if shared else one


def passes(config: ConfigDict) -> Iterator[tuple[str, Pass]]:
    """The passes of teachers over the training set or its views, one for all seeds."""
    if config.data.block_examples:
        yield from _over_blocks(config)
        return
    data = load_data(config)
    whole = shapes_of(data.train)
    images, half = whole["inputs"], resized(whole, len(data.train["id"]) // 2)["inputs"]
    teacher = build_model(config.teacher, data.num_classes)
    apply, params = teacher.apply, common.frozen(teacher, images)
    yield "soft_targets", common.logits_over("logits", apply, params, images)
    yield "unlabelled", common.logits_over("logits", apply, params, half)
    shifts = augment.shifts(config.shifts.pixels)
    yield "shift_targets", common.of_views("logits", apply, params, images, shifts)
    small = build_model(config.distorted, data.num_classes)
    members = common.frozen(small, images, len(config.distorted.members))
    own = mean_logits(small), members, images, distortions(config)
    yield "distorted_targets", common.of_views("logits", *own)


def _over_blocks(config: ConfigDict) -> Iterator[tuple[str, Pass]]:
    """The teacher's pass over a part of a set that is left on disk."""
    data, whole = _on_disk(config)
    size = min(config.data.block_examples, whole["id"].shape[0])
    images = resized(whole, size)["inputs"]
    teacher = build_model(config.teacher, data.num_classes)
    params = common.frozen(teacher, images)
    yield "soft_targets", common.logits_over("logits", teacher.apply, params, images)


def _in_blocks(config: ConfigDict) -> Iterator[tuple[str, Training]]:
    """The trainings on blocks of a set that is left on disk."""
    data, whole = _on_disk(config)
    for stage, one in _on_all(config, data, whole):
        batch_size = one.net.batch_size
        size = whole["id"].shape[0]
        steps = stream.cut(size, batch_size, config.data.block_examples).steps
        fields = {
            name: shape((steps, batch_size, *field.shape[1:]), field.dtype)
            for name, field in one.fields.items()
        }
        image = shape(fields["inputs"].shape[2:], fields["inputs"].dtype)
        blocks = Blocks(stream.make_block_epoch, steps, image, batch_axis=1)
        yield stage, one._replace(fields=fields, blocks=blocks)


def _on_disk(config: ConfigDict) -> tuple[Data, Shapes]:
    """A set that is left on disk, and the fields of all its examples."""
    data = open_data(config)
    assert data.streamed is not None
    return data, resized(shapes_of(data.streamed.read(np.arange(1))), data.streamed.size)


def _of_several_seeds(config: ConfigDict) -> Iterator[tuple[str, Training]]:
    data, seeds = load_data(config), len(config.seeds)
    images, taught = _fields(data)
    yield from _on_all(config, data, images)
    for width, times in zip(config.sweep.widths, config.sweep.times, strict=True):
        net = changed(config.sweep, hidden=(width, width))
        members = seeds * len(net.temperatures)
        yield "sweep", _on_targets(data, f"width_{width}", net, taught, members, passes=times)
    yield from _transfer_sets(config, data)
    yield from _views(config, data)


def _on_all(config: ConfigDict, data: Data, images: Shapes) -> Iterator[tuple[str, Training]]:
    """The trainings that read the whole set in order, of which these are the images."""
    seeds, taught = len(config.seeds), _taught(images, data)
    yield "teacher", _on_labels(data, "teacher", config.teacher, images, seeds)
    yield "baseline", _on_labels(data, "baseline", config.baseline, images, seeds)
    yield "distilled", _on_targets(data, "distilled", config.distilled, taught, seeds)
    for one in OBJECTIVES:
        net, names = config.objectives, dict.fromkeys([*_SOFT, *one.numbers])
        trained = _on_targets(data, one.name, net, taught, seeds, loss=one.loss, numbers=(*names,))
        yield "objectives", trained


def _transfer_sets(config: ConfigDict, data: Data) -> Iterator[tuple[str, Training]]:
    seeds, size = len(config.seeds), len(data.train["id"])
    images, taught = _fields(data)
    for stage, net, fields in _without_some(config.omissions, taught, data):
        yield stage, _on_targets(data, "student", net, fields, seeds)
    for percent in config.fractions.percentages:
        fields = resized(taught, max(1, round(percent / 100 * size)))
        count = fields["id"].shape[0]
        trained = _on_targets(
            data,
            f"percent_{percent:g}",
            _fitting(config.fractions, fields),
            fields,
            2 * seeds,
            passes=max(1, round(size / count)),
        )
        own = (_TARGETS,) if count == size else tuple(fields)  # each seed's own examples
        yield "fractions", trained._replace(own=own)
    net, half = config.unlabelled, size // 2
    first = changed(config.teacher, epochs=net.teacher_epochs)
    yield "unlabelled", _on_labels(data, "teacher_half", first, resized(images, half), seeds)
    theirs = resized({**taught, "label_known": shape((size,), np.bool_)}, half)
    for share in (0.0, net.labels_known):
        yield "unlabelled", _on_targets(data, f"known_{share:g}", net, theirs, seeds)


def _views(config: ConfigDict, data: Data) -> Iterator[tuple[str, Training]]:
    seeds, size = len(config.seeds), len(data.train["id"])
    images, taught = _fields(data)
    net, views = config.shifts, augment.shifts(config.shifts.pixels)
    show = (augment.random_view(views),)
    of_all = {**images, views.field: logits(size, views.num_views, data.num_classes)}
    on_labels = _on_labels(data, "shifts_labels", net, images, seeds)
    yield "shifts", on_labels._replace(transforms=show)
    on_shifts = _on_targets(data, "shifts_soft", net, of_all, seeds, transforms=show)
    yield "shifts", on_shifts._replace(own=(views.field,))
    yield "shifts", _on_targets(data, "shifts_averaged", net, taught, seeds)

    for name, net, fields in _without_some(config.moved_omissions, of_all, data):
        student = _on_targets(data, f"moved_{name}", net, fields, seeds, transforms=show)
        yield "moved_omissions", student._replace(own=(views.field,))

    net, members = config.distorted, len(config.distorted.members)
    show = (augment.random_view(new_distortions(config)),)
    on_labels = _on_labels(data, "distorted_labels", net, images, members)
    yield "distorted", on_labels._replace(transforms=show)
    views = distortions(config)
    of_all = {**images, views.field: logits(size, views.num_views, data.num_classes)}
    net = changed(net, epochs=net.student_epochs)
    show = (augment.random_view(views),)
    student = _on_targets(data, "distorted_soft", net, of_all, seeds, transforms=show)
    yield "distorted_students", student._replace(own=())  # one ensemble teaches all


def _without_some(
    net: ConfigDict, fields: Shapes, data: Data
) -> Iterator[tuple[str, ConfigDict, Shapes]]:
    """Each transfer set without some classes: its name, its section, and its fields."""
    for what in OMISSIONS:
        left = what.select({"label": data.train["label"]}, what.classes)
        some = resized(fields, len(left["label"]))
        yield what.name, _fitting(changed(net, epochs=net[what.epochs]), some), some


def _fields(data: Data) -> tuple[Shapes, Shapes]:
    """The fields of the training set, and those with a teacher's logits."""
    images = shapes_of(data.train)
    return images, _taught(images, data)


def _taught(images: Shapes, data: Data) -> Shapes:
    return {**images, _TARGETS: logits(images["id"].shape[0], data.num_classes)}


def _fitting(net: ConfigDict, fields: Shapes) -> ConfigDict:
    """The section, with batches that are no larger than the set."""
    return changed(net, batch_size=min(net.batch_size, fields["id"].shape[0]))


def _on_targets(
    data: Data,
    name: str,
    net: ConfigDict,
    fields: Shapes,
    members: int,
    *,
    loss: train_step.Loss = step_losses.distillation_loss,
    numbers: tuple[str, ...] = _SOFT,
    **more: Any,
) -> Training:
    trained = _on_labels(data, name, net, fields, members)
    return trained._replace(loss=loss, numbers=numbers, own=(_TARGETS,), **more)


def _on_labels(data: Data, name: str, net: ConfigDict, fields: Shapes, members: int) -> Training:
    model, sets = build_model(net, data.num_classes), {"test_errors": shapes_of(data.test)}
    loss = step_losses.label_loss
    return Training(name, net, model, loss, fields, members, evaluation=sets)
