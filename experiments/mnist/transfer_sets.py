"""Transfer sets that lack classes, most examples or labels; biases put right afterwards (section 3)."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from distill_jax import processes, step_losses
from distill_jax.data import transfer
from distill_jax.data.images import Examples
from distill_jax.nets import Net
from distill_jax.train_step import Transform
from experiments.common.config import changed
from experiments.common.study import Context, Row, make_row
from experiments.mnist import bias, views
from experiments.mnist.data import load_data, with_soft_targets
from experiments.mnist.nets import error_row, errors_by_variant, of_images, of_mnist, train


class Omission(NamedTuple):
    """A transfer set without some classes, or without all others.

    name: of its stage; row, shifted: its row, and what the row of shifted biases adds. select: makes
    the set of all examples and the classes, whose biases are shifted. epochs: the field that says how
    long. shifts: that are tried. published: the paper's value of each metric as learned, and with the
    bias that is best on the test set.
    """

    name: str
    row: str
    shifted: str
    classes: tuple[int, ...]
    select: Callable[[Examples, Sequence[int]], Examples]
    epochs: str
    shifts: np.ndarray
    published: Mapping[str, tuple[float | None, float | None]]


OMISSIONS = (
    Omission(
        "without_3",
        "without 3s",
        "bias of 3 shifted",
        (3,),
        transfer.without_classes,
        "epochs",
        bias.SHIFTS,
        {"test_errors": (206, 109), "errors_on_3": (133, 14), "bias_shift": (None, 3.5)},
    ),
    Omission(
        "only_7_8",
        "only 7s and 8s",
        "biases of 7 and 8 shifted",
        (7, 8),
        transfer.only_classes,
        "only_7_8_epochs",
        -bias.SHIFTS,
        {"test_error_percent": (47.3, 13.2), "bias_shift": (None, -7.6)},
    ),
)


def without_3(context: Context) -> list[Row]:
    """Distilled without any 3, then with the bias of 3 raised."""
    return _as_they_are(context, OMISSIONS[0])


def only_7_8(context: Context) -> list[Row]:
    """Distilled from 7s and 8s alone, then with both biases lowered."""
    return _as_they_are(context, OMISSIONS[1])


def moved(context: Context) -> list[Row]:
    """Both of shifted images, with the teacher's logits of the same shift: beyond the paper."""
    if not of_images(context, "transfer sets of shifted images without some digits"):
        return []
    wanted = [each for each in enumerate(OMISSIONS) if _has_classes(context, each[1])]
    if not wanted:
        return []
    config = context.config
    examples, show = views.with_shifts(context)
    rows = []
    for number, what in wanted:
        nets = _train_on(
            context,
            f"moved_{what.name}",
            what,
            examples,
            config.moved_omissions,
            transforms=[show],
            number=number,
        )
        # The paper's images are not moved.
        published = dict.fromkeys(what.published, (None, None))
        row = f"{what.row}, {views.moved_by(config)}"
        rows += _omission_rows(context, what._replace(row=row, published=published), nets)
    return rows


def fractions(context: Context) -> list[Row]:
    """Hard against soft targets on ever less data, for as many steps."""
    config = context.config
    net = config.fractions
    full = with_soft_targets(context, load_data(config).train, net.temperature)
    rows = []
    for percent in net.percentages:
        examples = [
            transfer.fraction(fields, percent / 100, config.data.seed + s)
            for s, fields in enumerate(full)
        ]
        size = len(examples[0]["id"])
        nets = train(
            context,
            f"percent_{percent:g}",
            changed(net, batch_size=min(net.batch_size, size)),
            examples,
            step_losses.distillation_loss,
            variants=[{"temperature": net.temperature, "hard_weight": hard} for hard in (1.0, 0.0)],
            passes=max(1, round(len(full[0]["id"]) / size)),
        )
        for targets, errors in zip(("hard", "soft"), errors_by_variant(nets, 2), strict=True):
            rows.append(
                make_row(
                    config,
                    "mnist_fraction",
                    f"{targets} targets, {percent:g} % of the training set",
                    "test_errors",
                    errors,
                    seconds=nets.seconds / 2,
                    fraction=percent,
                    targets=targets,
                )
            )
    return rows


def unlabelled(context: Context) -> list[Row]:
    """A teacher of one half with labels; students of the other half without."""
    config, data = context.config, load_data(context.config)
    net = config.unlabelled
    half = len(data.train["id"]) // 2
    theirs, ours = transfer.hold_out(data.train, half, config.data.seed)
    teachers = train(
        context,
        "teacher_half",
        changed(config.teacher, epochs=net.teacher_epochs),
        [theirs] * len(config.seeds),
        step_losses.label_loss,
    )
    rows = [error_row(context, "mnist_unlabelled", "teacher, labels of one half", teachers)]
    logits = teachers.logits(ours["inputs"])
    for share in (0.0, net.labels_known):
        partly = transfer.labels_known(ours, share, config.data.seed)
        nets = train(
            context,
            f"known_{share:g}",
            net,
            [{**partly, "teacher_logits": own} for own in logits],
            step_losses.distillation_loss,
            variants=[
                {"temperature": net.temperature, "hard_weight": net.hard_weight if share else 0.0}
            ],
            number=1,  # the teachers are 0
        )
        known = f"{100 * share:g}% of the labels" if share else "no labels"
        row = f"distilled, other half, {known}"
        rows.append(error_row(context, "mnist_unlabelled", row, nets))
    return rows


def _has_classes(context: Context, what: Omission) -> bool:
    """Whether the set has the classes and at least one other; if not, the stage has no rows."""
    data = load_data(context.config)
    there = set(np.unique(data.train["label"]).tolist())
    has = there >= set(what.classes) and len(there - set(what.classes)) > 0
    if not has and processes.is_main():
        listed = " and ".join(map(str, what.classes))
        print(
            f"{what.row}: left out, as {context.config.data.source} has {data.num_classes} classes, and "
            f"{listed} with others are needed",
            flush=True,
        )
    return has


def _as_they_are(context: Context, what: Omission) -> list[Row]:
    """The rows of one of them, of images as they are."""
    if not _has_classes(context, what):
        return []
    net = context.config.omissions
    examples = with_soft_targets(context, load_data(context.config).train, net.temperature)
    return _omission_rows(context, what, _train_on(context, "student", what, examples, net))


def _train_on(
    context: Context,
    name: str,
    what: Omission,
    examples: Sequence[Examples],
    net: ConfigDict,
    *,
    transforms: Sequence[Transform] = (),
    number: int = 0,
) -> Net:
    """Students of what is left of all examples, in batches that are no larger than that."""
    some = [what.select(fields, what.classes) for fields in examples]
    return train(
        context,
        name,
        changed(net, epochs=net[what.epochs], batch_size=min(net.batch_size, len(some[0]["id"]))),
        some,
        step_losses.distillation_loss,
        variants=[{"temperature": net.temperature, "hard_weight": net.hard_weight}],
        transforms=transforms,
        number=number,
    )


def _omission_rows(context: Context, what: Omission, nets: Net) -> list[Row]:
    """Rows as learned, and with the classes' biases shifted three ways.

    By what is best on the test set, as in the paper; and, ours, from the classes' prior, without a
    label; and by what is best on validation data, where some are held out.
    """
    config, data = context.config, load_data(context.config)
    classes, shifts = what.classes, what.shifts
    prior = float(np.isin(data.train["label"], classes).mean())

    def by_validation(seed: int) -> float:
        held_out = nets.member(seed).logits(data.validation["inputs"])
        return bias.best_shift(held_out, data.validation["label"], classes, shifts)

    on_test = [nets.member(s).logits(data.test["inputs"]) for s in range(len(config.seeds))]
    ways: list[tuple[str, str | None, Callable[[int], float]]] = [
        (what.row, None, lambda s: 0.0),
        (
            f"{what.row}, {what.shifted} (best on test)",
            "test",
            lambda s: bias.best_shift(on_test[s], data.test["label"], classes, shifts),
        ),
        (
            f"{what.row}, {what.shifted} (class prior)",
            None,
            lambda s: bias.prior_shift(nets.member(s).logits(data.train["inputs"]), classes, prior),
        ),
    ]
    if len(data.validation["id"]):
        ways.append((f"{what.row}, {what.shifted} (validation)", "validation", by_validation))
    rows = []
    for place, (row, selection, find_shift) in enumerate(ways):
        chosen = [find_shift(s) for s in range(len(config.seeds))]
        measured = [
            _measure(logits, data.test["label"], classes, shift)
            for logits, shift in zip(on_test, chosen, strict=True)
        ]
        for metric, paper in what.published.items():
            if place == 0 and metric == "bias_shift":
                continue
            values = [numbers[metric] for numbers in measured]
            value = paper[place] if place < 2 else None
            rows.append(
                make_row(
                    config,
                    f"mnist_{what.name}",
                    row,
                    metric,
                    values,
                    seconds=nets.seconds,
                    paper=of_mnist(config, value),
                    selection=selection,
                )
            )
    return rows


def _measure(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[int], shift: float
) -> dict[str, float]:
    wrong = bias.error_mask(bias.shift_classes(logits, classes, shift), labels)
    return {
        "test_errors": float(wrong.sum()),
        "test_error_percent": 100.0 * float(wrong.mean()),
        f"errors_on_{classes[0]}": float(wrong[labels == classes[0]].sum()),
        "bias_shift": shift,
    }
