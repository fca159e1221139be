"""The teacher, its soft targets, and nets that are trained with and without them (section 3)."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from distill_jax import losses, soft_targets, step_losses
from distill_jax.data.images import Examples
from distill_jax.nets import load
from experiments.common import costs
from experiments.common.config import at, changed
from experiments.common.study import Context, Row, make_row, write_json
from experiments.mnist import differences
from experiments.mnist.data import (
    load_data,
    open_data,
    training_parts,
    training_set,
    training_set_with_targets,
    with_soft_targets,
)
from experiments.mnist.nets import error_row, errors_by_variant, shown, sizes, train


def teacher(context: Context) -> list[Row]:
    """The large net: two layers of 1200, dropout, weight constraints and jitter (67 errors)."""
    return _train_on_labels(context, "teacher", 67)


def baseline(context: Context) -> list[Row]:
    """The small net with no regularisation (146 errors)."""
    return _train_on_labels(context, "baseline", 146)


def _train_on_labels(context: Context, name: str, paper: float) -> list[Row]:
    net = context.config[name]
    examples = training_set(context.config, net)
    nets = train(context, name, net, examples, step_losses.label_loss)
    return [error_row(context, "mnist", f"{name} {sizes(net)}", nets, paper)]


def make_soft_targets(context: Context) -> list[Row]:
    """Every seed's teacher's logits over the training set, kept by example id."""
    config = context.config
    nets = load(context.inputs["teacher"] / "teacher")
    for s, seed in enumerate(config.seeds):
        net = nets.member(s)
        logits, digests, ids = [], [], []
        for examples in training_parts(config):
            logits.append(net.logits(examples["inputs"]))
            digests.append(soft_targets.digests(examples["inputs"]))
            ids.append(examples["id"])
            if s == 0 and len(logits) == 1:
                names = open_data(config).class_names
                digits = telling_digits(examples, logits[0], names)
                write_json(context.directory / "digits.json", digits)
        soft_targets.write(
            context.directory / f"seed_{seed}",
            np.concatenate(logits),
            np.concatenate(digests),
            teacher=net.fingerprint,
            ids=np.concatenate(ids),
        )
    return []


def distilled(context: Context) -> list[Row]:
    """The small net regularised solely by soft targets (74 errors)."""
    net = context.config.distilled
    variant = {"temperature": at(net, "temperature"), "hard_weight": at(net, "hard_weight")}
    examples = training_set_with_targets(context, net)
    loss = step_losses.distillation_loss
    nets = train(context, "distilled", net, examples, loss, variants=[variant])
    row = f"distilled {sizes(net)}, T={shown(variant['temperature'])}"
    return [error_row(context, "mnist", row, nets, 74)]


def costs_of_nets(context: Context) -> list[Row]:
    """What the teacher and both small nets cost, and how good their predictions are."""
    config, test = context.config, open_data(context.config).test
    candidates = [
        costs.of_net(f"{name} {sizes(config[name])}", load(context.inputs[name] / name))
        for name in ("teacher", "baseline", "distilled")
    ]
    return costs.rows(config, "mnist_costs", candidates, test["inputs"], test["label"])


def sweep(context: Context) -> list[Row]:
    """Widths times temperatures; all temperatures and seeds of a width are one vmapped program."""
    config = context.config
    net = config.sweep
    examples = with_soft_targets(context, load_data(config).train, None)
    variants = [{"temperature": t, "hard_weight": net.hard_weight} for t in net.temperatures]
    rows = []
    for width, times in zip(net.widths, net.times, strict=True):
        nets = train(
            context,
            f"width_{width}",
            changed(net, hidden=(width, width)),
            examples,
            step_losses.distillation_loss,
            variants=variants,
            passes=times,
        )
        errors = errors_by_variant(nets, len(variants))
        for temperature, found in zip(net.temperatures, errors, strict=True):
            rows.append(
                make_row(
                    config,
                    "mnist_temperature",
                    f"2x{width}, T={temperature:g}",
                    "test_errors",
                    found,
                    seconds=nets.seconds / len(variants),
                    width=width,
                    temperature=temperature,
                )
            )
        rows += differences.of_temperatures(config, f"2x{width}", net.temperatures, errors)
    return rows


def telling_digits(
    examples: Examples, logits: np.ndarray, class_names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The 2s that the teacher thinks most like a 3 and most like a 7 (section 1), and others' like."""
    labels = examples["label"]
    right = logits.argmax(axis=-1) == labels
    rows = []
    for label, other in ((2, 3), (2, 7), (4, 9), (8, 5)):
        if max(label, other) >= logits.shape[1]:  # a set of fewer classes than digits
            continue
        candidates = np.flatnonzero(right & (labels == label))
        if len(candidates):
            rows.append(int(candidates[logits[candidates, other].argmax()]))
    return [
        {
            "inputs": examples["inputs"][row].tolist(),
            "label": int(labels[row]),
            "names": list(class_names),
            "soft_targets": {
                str(t): np.asarray(losses.softmax(jax.numpy.asarray(logits[row]), t)).tolist()
                for t in (1, 20)
            },
        }
        for row in rows
    ]
