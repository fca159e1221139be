"""Section 3 of the paper: MNIST. The stages, and the rows that they measure."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from distill_jax import losses, soft_targets, train_step
from distill_jax.data import transfer
from distill_jax.data.images import Examples
from distill_jax.nets import read_meta
from experiments.common import members
from experiments.common.study import (
    Context,
    Row,
    Stage,
    draw_report,
    finished_rows,
    make_row,
    read_json,
    run_study,
    write_json,
)
from experiments.mnist import figures
from experiments.mnist.nets import (
    load_data,
    train,
    train_on_labels,
    training_parts,
    training_set_with_targets,
    with_soft_targets,
)
from experiments.mnist.transfer_sets import only_7_8, without_3

TITLE = "Distilling the Knowledge in a Neural Network, section 3: MNIST"
CAPTIONS = {
    "mnist": "A large regularised net, a small one without regularisation, and the small one "
    "distilled from the large one at T = 20 without jitter. Errors on the 10,000 test cases.",
    "mnist_temperature": "With 300 or more units in each hidden layer all temperatures above 8 gave "
    "fairly similar results; with 30 units, 2.5 to 4 worked significantly better.",
    "mnist_without_3": "Distilled without any example of a 3. Most errors come from its bias, which "
    "is much too low: with the right bias, a digit that was never seen is mostly right.",
    "mnist_only_7_8": "Distilled from the 7s and 8s alone, and with their biases lowered.",
    "mnist_fraction": "The introduction's claim: soft targets carry so much per case that the small "
    "net can be trained on much less data.",
    "mnist_unlabelled": "Section 1's claim: the transfer set can consist entirely of unlabelled data. "
    "The teacher saw the labels of one half, the students the images of the other.",
}


def run(config: ConfigDict, workdir: Path, only: Sequence[str], reuse: Sequence[Path]) -> None:
    """Runs the stages, all or `only` some, and draws the report."""
    run_study(config, workdir, STAGES, write_report, only, reuse)


def teacher(context: Context) -> list[Row]:
    """The large net: two layers of 1200, dropout, weight constraints and jitter (67 errors)."""
    net = context.config.teacher
    nets = train_on_labels(context, "teacher", net)
    return [_error_row(context, "mnist", f"teacher 2x{net.hidden[0]}", nets, 67)]


def make_soft_targets(context: Context) -> list[Row]:
    """Every seed's teacher's logits over the training set, kept by example id."""
    config = context.config
    nets = train_on_labels(context, "teacher", config.teacher, context.inputs["teacher"])
    for s, seed in enumerate(config.seeds):
        params = jax.tree.map(lambda leaf, s=s: leaf[s], nets.params)
        name = soft_targets.fingerprint(params, json.loads(config.teacher.to_json()))
        parts: list[soft_targets.SoftTargets] = []
        for examples in training_parts(config):
            logits = nets.member(s).logits(examples["inputs"])
            if s == 0 and not parts:
                write_json(context.directory / "digits.json", _telling_digits(examples, logits))
            parts.append(soft_targets.make(logits, examples, name))
        soft_targets.save(context.directory / f"seed_{seed}", _joined(parts))
    return []


def baseline(context: Context) -> list[Row]:
    """The small net with no regularisation (146 errors)."""
    net = context.config.baseline
    nets = train_on_labels(context, "baseline", net)
    return [_error_row(context, "mnist", f"baseline 2x{net.hidden[0]}", nets, 146)]


def distilled(context: Context) -> list[Row]:
    """The small net regularised solely by soft targets (74 errors)."""
    net = context.config.distilled
    row = f"distilled 2x{net.hidden[0]}, T={net.temperature:g}"
    return [_distil(context, "distilled", row, train_step.distillation_loss, net.hard_weight, 74)]


def alternatives(context: Context) -> list[Row]:
    """The same net without labels, with label-modified soft targets, and by matching logits."""
    net = context.config.distilled
    at = f"T={net.temperature:g}"
    return [
        _distil(
            context, "soft_only", f"soft targets only, {at}", train_step.distillation_loss, 0.0
        ),
        _distil(
            context,
            "label_modified",
            f"label-modified soft targets, {at}",
            train_step.label_modified_loss,
            net.hard_weight,
        ),
        _distil(context, "logit_matching", "logit matching", train_step.logit_matching_loss, 0.0),
    ]


def sweep(context: Context) -> list[Row]:
    """Widths times temperatures; all temperatures and seeds of a width are one vmapped program."""
    config = context.config
    net = config.sweep
    examples = with_soft_targets(context, load_data(config).train, None)
    rows = []
    for width in net.widths:
        nets = train(
            context,
            f"width_{width}",
            _changed(net, hidden=(width, width)),
            examples,
            train_step.distillation_loss,
            [{"temperature": t, "hard_weight": net.hard_weight} for t in net.temperatures],
        )
        for temperature, errors in zip(
            net.temperatures, _by_variant(nets, len(net.temperatures)), strict=True
        ):
            rows.append(
                make_row(
                    config,
                    "mnist_temperature",
                    f"2x{width}, T={temperature:g}",
                    "test_errors",
                    errors,
                    nets.seconds / len(net.temperatures),
                    width=width,
                    temperature=temperature,
                )
            )
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
            _changed(net, batch_size=min(net.batch_size, size)),
            examples,
            train_step.distillation_loss,
            [{"temperature": net.temperature, "hard_weight": hard} for hard in (1.0, 0.0)],
            passes=max(1, round(len(full[0]["id"]) / size)),
        )
        for targets, errors in zip(("hard", "soft"), _by_variant(nets, 2), strict=True):
            rows.append(
                make_row(
                    config,
                    "mnist_fraction",
                    f"{targets} targets, {percent:g} % of the training set",
                    "test_errors",
                    errors,
                    nets.seconds / 2,
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
        _changed(config.teacher, epochs=net.teacher_epochs),
        [theirs] * len(config.seeds),
        train_step.label_loss,
    )
    rows = [_error_row(context, "mnist_unlabelled", "teacher, labels of one half", teachers)]
    targets = [
        soft_targets.make(
            teachers.member(s).logits(ours["inputs"]), ours, f"half teacher, seed {seed}"
        )
        for s, seed in enumerate(config.seeds)
    ]
    for share in (0.0, net.labels_known):
        partly = transfer.labels_known(ours, share, config.data.seed)
        nets = train(
            context,
            f"known_{share:g}",
            net,
            [soft_targets.attach(partly, own, net.temperature) for own in targets],
            train_step.distillation_loss,
            [{"temperature": net.temperature, "hard_weight": net.hard_weight if share else 0.0}],
        )
        known = f"{share:.0%} of the labels" if share else "no labels"
        row = f"distilled, other half, {known}"
        rows.append(_error_row(context, "mnist_unlabelled", row, nets))
    return rows


def write_report(workdir: Path) -> None:
    """Draws report.md and report.html from results.json and what the stages left beside it."""
    curves = {
        path.parent.name: members.curve(read_meta(path.parent)["history"])
        for path in sorted(workdir.glob("stages/*/*/net.json"))
    }
    digits = workdir / "stages" / "soft_targets" / "digits.json"
    rows = finished_rows(workdir, STAGES)
    reference = Path(__file__).with_name("reference.json")
    drawn = figures.all_figures(rows, curves, read_json(digits) if digits.exists() else [])
    draw_report(workdir, TITLE, CAPTIONS, rows, reference, drawn)


STAGES = (
    Stage("teacher", teacher, (), ("seeds", "selection", "data", "teacher")),
    Stage("soft_targets", make_soft_targets, ("teacher",)),
    Stage("baseline", baseline, (), ("seeds", "selection", "data", "baseline")),
    Stage("distilled", distilled, ("soft_targets",), ("distilled",)),
    Stage("alternatives", alternatives, ("soft_targets",), ("distilled",)),
    Stage("sweep", sweep, ("soft_targets",), ("sweep",)),
    Stage("without_3", without_3, ("soft_targets",), ("omissions",)),
    Stage("only_7_8", only_7_8, ("soft_targets",), ("omissions",)),
    Stage("fractions", fractions, ("soft_targets",), ("fractions",)),
    Stage("unlabelled", unlabelled, (), ("seeds", "selection", "data", "teacher", "unlabelled")),
)


def _distil(
    context: Context,
    name: str,
    row: str,
    loss: train_step.Loss,
    hard_weight: float,
    paper: float | None = None,
) -> Row:
    net = context.config.distilled
    examples = training_set_with_targets(context, net)
    variant = {"temperature": net.temperature, "hard_weight": hard_weight}
    nets = train(context, name, net, examples, loss, [variant])
    return _error_row(context, "mnist", row, nets, paper)


def _error_row(
    context: Context, table: str, row: str, nets: members.Net, paper: float | None = None
) -> Row:
    errors = nets.history[-1]["test_errors"]
    return make_row(context.config, table, row, "test_errors", errors, nets.seconds, paper)


def _by_variant(nets: members.Net, variants: int) -> np.ndarray:
    """Test errors after the last epoch `[variants, seeds]`."""
    return np.reshape(nets.history[-1]["test_errors"], (variants, -1))


def _changed(net: ConfigDict, **changes: Any) -> ConfigDict:
    return ConfigDict({**net.to_dict(), **changes})


def _joined(parts: Sequence[soft_targets.SoftTargets]) -> soft_targets.SoftTargets:
    """One teacher's soft targets of all parts of a set."""
    return soft_targets.SoftTargets(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.digests for part in parts]),
        np.concatenate([part.logits for part in parts]),
        parts[0].meta,
    )


def _telling_digits(examples: Examples, logits: np.ndarray) -> list[dict[str, Any]]:
    """The 2s that the teacher thinks most like a 3 and most like a 7 (section 1), and others' like."""
    labels = examples["label"]
    right = logits.argmax(axis=-1) == labels
    rows = []
    for label, other in ((2, 3), (2, 7), (4, 9), (8, 5)):
        candidates = np.flatnonzero(right & (labels == label))
        if len(candidates):
            rows.append(int(candidates[logits[candidates, other].argmax()]))
    return [
        {
            "inputs": examples["inputs"][row].tolist(),
            "label": int(labels[row]),
            "soft_targets": {
                str(t): np.asarray(losses.softmax(jax.numpy.asarray(logits[row]), t)).tolist()
                for t in (1, 20)
            },
        }
        for row in rows
    ]
