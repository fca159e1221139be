"""Students that see shifted or distorted images, each with the teacher's logits of just that view.

The paper's transfer set is not moved. Beside every student stands its control: the same net on the
labels of such views.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from distill_jax import soft_targets, step_losses
from distill_jax.data import augment
from distill_jax.data.augment import Views
from distill_jax.data.images import Examples
from distill_jax.models import Model, Params
from distill_jax.nets import Net, load
from distill_jax.train_step import Transform
from experiments.common.config import changed
from experiments.common.study import Context, Row, make_row
from experiments.mnist.data import load_data
from experiments.mnist.nets import error_row, of_images, sizes, train


def shift_targets(context: Context) -> list[Row]:
    """Every seed's teacher's logits of all shifts of the training images."""
    if of_images(context, "soft targets of shifted images"):
        teachers = load(context.inputs["teacher"] / "teacher")
        for s, seed in enumerate(context.config.seeds):
            net, folder = teachers.member(s), context.directory / f"seed_{seed}"
            _write(context, folder, net.model.apply, net, _shifts(context))
    return []


def shifts(context: Context) -> list[Row]:
    """The small net on shifted images with the teacher's logits of each; controls on labels."""
    if not of_images(context, "students of shifted images"):
        return []
    config, train_set = context.config, load_data(context.config).train
    net, warm = config.shifts, config.distilled.temperature
    joined, moving = with_shifts(context)
    averaged = [_averaged(fields, _shifts(context), net.pixels) for fields in joined]
    show, soft_loss = [moving], step_losses.distillation_loss
    numbers = {"temperature": net.temperature, "hard_weight": net.hard_weight}
    moved = moved_by(config)
    on_labels = train(
        context,
        "shifts_labels",
        net,
        [train_set] * len(joined),
        step_losses.label_loss,
        transforms=show,
    )
    on_shifts = train(
        context, "shifts_soft", net, joined, soft_loss, variants=[numbers], transforms=show
    )
    numbers = {**numbers, "temperature": warm}
    on_means = train(context, "shifts_averaged", net, averaged, soft_loss, variants=[numbers])
    small = f"distilled {sizes(net)}"
    rows = {
        f"{sizes(net)} on labels, {moved}": on_labels,
        f"{small}, T={net.temperature:g}, {moved}, logits of the same shift": on_shifts,
        f"{small}, T={warm:g}, logits averaged over shifts": on_means,
    }
    return [error_row(context, "mnist_shifts", row, trained) for row, trained in rows.items()]


def with_shifts(context: Context) -> tuple[list[Examples], Transform]:
    """Every seed's examples with the teacher's logits of all shifts, and what shows one at random."""
    train_set, views = load_data(context.config).train, _shifts(context)
    stores = [context.inputs["shift_targets"] / f"seed_{seed}" for seed in context.config.seeds]
    return [_attach(train_set, store, views) for store in stores], augment.random_view(views)


def moved_by(config: ConfigDict) -> str:
    """How the images are moved, in a row's name."""
    return f"images moved by up to {config.shifts.pixels} pixels"


def distorted(context: Context) -> list[Row]:
    """Small nets on labels of ever new distorted images, and their ensemble (section 1)."""
    if not of_images(context, "nets of distorted images"):
        return []
    config, data = context.config, load_data(context.config)
    net, table = config.distorted, "mnist_distorted"
    views = new_distortions(config)
    members = train(
        context,
        "distorted_labels",
        net,
        [data.train] * len(net.members),
        step_losses.label_loss,
        seeds=net.members,
        transforms=[augment.random_view(views)],
    )
    mean = mean_logits(members.model)
    logits = soft_targets.logits_over(mean, members.params, data.test["inputs"])
    together = float((logits.argmax(axis=-1) != data.test["label"]).sum())
    count, seconds = len(net.members), members.seconds
    ensemble = f"ensemble of {count} of them, geometric mean"
    return [
        error_row(context, table, f"{sizes(net)} on labels of distorted images", members),
        make_row(config, table, ensemble, "test_errors", [together], seconds=seconds),
    ]


def distorted_targets(context: Context) -> list[Row]:
    """The ensemble's logits of some distorted views of the training images."""
    if of_images(context, "soft targets of distorted images"):
        members = load(context.inputs["distorted"] / "distorted_labels")
        mean = mean_logits(members.model)
        _write(context, context.directory / "ensemble", mean, members, distortions(context.config))
    return []


def distorted_students(context: Context) -> list[Row]:
    """The small net, distilled from the ensemble on those views, without labels."""
    if not of_images(context, "students of distorted images"):
        return []
    config, views = context.config, distortions(context.config)
    net = changed(config.distorted, epochs=config.distorted.student_epochs)
    store = context.inputs["distorted_targets"] / "ensemble"
    joined = _attach(load_data(config).train, store, views)
    trained = train(
        context,
        "distorted_soft",
        net,
        [joined] * len(config.seeds),
        step_losses.distillation_loss,
        variants=[{"temperature": net.temperature, "hard_weight": net.hard_weight}],
        transforms=[augment.random_view(views)],
    )
    row = f"distilled {sizes(net)} from the ensemble, T={net.temperature:g}, {net.views} distorted views"
    return [error_row(context, "mnist_distorted", row, trained)]


def _shifts(context: Context) -> Views:
    return augment.shifts(context.config.shifts.pixels)


def new_distortions(config: ConfigDict) -> Views:
    """So many distorted views that hardly one is ever seen twice."""
    return augment.handwriting(2**31 - 1, config.data.seed)


def distortions(config: ConfigDict) -> Views:
    """The distorted views that the ensemble's logits are kept of."""
    return augment.handwriting(config.distorted.views, config.data.seed)


def mean_logits(model: Model) -> Callable[[Params, jax.Array], jax.Array]:
    """The mean of members' logits: a geometric mean of their distributions at every temperature."""

    def apply(params: Params, images: jax.Array) -> jax.Array:
        return jnp.mean(jax.lax.map(lambda member: model.apply(member, images), params), axis=0)

    return apply


def _write(
    context: Context,
    folder: Path,
    apply: Callable[[Params, jax.Array], jax.Array],
    net: Net,
    views: Views,
) -> None:
    train_set = load_data(context.config).train
    soft_targets.write_views(
        folder,
        apply,
        net.params,
        train_set["inputs"],
        views,
        teacher=net.fingerprint,
        ids=train_set["id"],
    )


def _attach(examples: Examples, folder: Path, views: Views) -> Examples:
    return soft_targets.attach(examples, soft_targets.load(folder), views=views)


def _averaged(examples: Examples, views: Views, pixels: int) -> Examples:
    """The images as they are, with the mean logits of their shifts, of which near ones weigh more."""
    far = np.arange(-pixels, pixels + 1)
    near = np.exp(-0.5 * np.square(far))  # a deviation of one pixel
    weights = np.outer(near, near).ravel() / near.sum() ** 2
    logits = np.tensordot(weights.astype(np.float32), examples[views.field], axes=(0, 1))
    fields = {name: field for name, field in examples.items() if name != views.field}
    return {**fields, "teacher_logits": logits}
