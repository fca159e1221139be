"""Teacher, soft targets of moved images, student, what they cost, and the student as files."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from distill_jax import export, models, nets, sharding, soft_targets, trainer
from distill_jax.data import augment
from distill_jax.step_losses import distillation_loss, label_loss
from experiments.common import costs, image_sets
from experiments.common.run import Study
from experiments.common.study import Context, Row, Stage, draw_report, finished_rows, make_row
from experiments.common.training import make_recipe
from experiments.custom.nets import student, teacher

CAPTIONS = {
    "custom": "A net on labels, and the same on the teacher's soft targets of the images that it sees.",
    "custom_costs": costs.CAPTION,
}
_load = functools.cache(image_sets.load)


def train_teacher(context: Context) -> list[Row]:
    """The large net, on labels."""
    net, data = context.config.teacher, _data(context)
    model = teacher(net.depth, net.width, data.num_classes)
    return [_train(context, "teacher", model, data.train)]


def write_targets(context: Context) -> list[Row]:
    """The teacher's logits of every moved image."""
    net, train = nets.load_net(context.inputs["teacher"] / "teacher"), _data(context).train
    soft_targets.write_views(
        context.directory / "views",
        net.model.apply,
        net.params,
        train["inputs"],
        augment.shifts(context.config.views.shift),
        teacher=net.fingerprint,
        ids=train["id"],
    )
    return []


def train_students(context: Context) -> list[Row]:
    """The small net on labels, and on soft targets."""
    data, model = _data(context), _student(context)
    store = soft_targets.load(context.inputs["targets"] / "views", num_classes=data.num_classes)
    views = augment.shifts(context.config.views.shift)
    joined = soft_targets.attach(data.train, store, views=views)
    on_labels = _train(context, "labels", model, data.train)
    return [on_labels, _train(context, "distilled", model, joined, distillation_loss)]


def measure(context: Context) -> list[Row]:
    """What the nets cost; and the first student as files that other programs run."""
    data, students = _data(context), context.inputs["students"]
    named = {"teacher": nets.load_net(context.inputs["teacher"] / "teacher")}
    for name in ("labels", "distilled"):
        named[name] = nets.load_net(students / name, model=_student(context))
    inputs, label = data.test["inputs"], data.test["label"]
    how = {"formats": context.config.export.formats, "class_names": data.class_names}
    folder, net = context.directory / "student", named["distilled"]
    for file in export.write(folder, net, inputs[:256], overwrite=True, **how):
        print(f"{folder / file.name}: {file.size} bytes, logits within {file.difference:.1g}")
    found = [costs.of_net(name, net) for name, net in named.items()]
    return costs.rows(context.config, "custom_costs", found, inputs, label)


def _data(context: Context) -> Any:
    return _load(FrozenConfigDict(context.config.data))


def _student(context: Context) -> models.Model:
    data, hidden = _data(context), context.config.student.hidden
    return student(int(np.prod(data.train["inputs"].shape[1:])), tuple(hidden), data.num_classes)


def _train(
    context: Context, name: str, model: models.Model, examples: Any, loss: Any = label_loss
) -> Row:
    """Trains nets on moved images, one for each seed; the teacher is one."""
    config, views = context.config, augment.shifts(context.config.views.shift)
    net, seeds = config["teacher" if name == "teacher" else "student"], config.seeds
    numbers, test = ("learning_rate", "temperature", "hard_weight"), _data(context).test
    trained = trainer.train(
        context.directory / name,
        model,
        examples,
        loss,
        dataclasses.replace(make_recipe(net), transforms=[augment.random_view(views)]),
        keys=context.keys(seeds[:1] if name == "teacher" else seeds),
        hyper={number: net[number] for number in numbers if number in net},
        evaluation={"test_errors": test},
        mesh=sharding.make_mesh(**config.mesh),
        name=name,
    )
    errors = 100 * np.asarray(trained.history[-1]["test_errors"]) / len(test["label"])
    return make_row(config, "custom", name, "error_percent", errors, seconds=trained.seconds)


def write_report(workdir: Path) -> None:
    """Draws report.md and report.html from results.json."""
    rows, title, none = finished_rows(workdir, STAGES), "Distilled: your own", Path("none")
    draw_report(workdir, rows, [], title=title, captions=CAPTIONS, reference=none)


_DATA = ("seeds", "selection", "data", "views")
STAGES = (
    Stage("teacher", train_teacher, (), (*_DATA, "teacher"), number=1, extends=True),
    Stage("targets", write_targets, ("teacher",), number=2),
    Stage("students", train_students, ("targets",), ("student",), number=3, extends=True),
    Stage("measure", measure, ("teacher", "students"), ("export",), number=4),
)

STUDY = Study(STAGES, write_report, image_sets.check_source, image_sets.data_conflicts)
