"""Transfer sets that lack whole classes, and biases put right afterwards (section 3)."""

from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from distill_jax import train_step
from distill_jax.data import transfer
from distill_jax.data.images import Examples
from experiments.common.study import Context, Row, make_row
from experiments.mnist import bias
from experiments.mnist.nets import load_data, train, with_soft_targets

Published = dict[str, tuple[float | None, float | None]]
"""The paper's value of a metric as learned, and with the bias that is best on the test set."""


def without_3(context: Context) -> list[Row]:
    """Distilled without any 3, then with the bias of 3 raised."""
    return _omission(
        context,
        context.config.omissions.epochs,
        ("mnist_without_3", "without 3s", "bias of 3 shifted"),
        [3],
        lambda examples: transfer.without_classes(examples, [3]),
        bias.SHIFTS,
        {"test_errors": (206, 109), "errors_on_3": (133, 14), "bias_shift": (None, 3.5)},
    )


def only_7_8(context: Context) -> list[Row]:
    """Distilled from 7s and 8s alone, then with both biases lowered."""
    return _omission(
        context,
        context.config.omissions.only_7_8_epochs,
        ("mnist_only_7_8", "only 7s and 8s", "biases of 7 and 8 shifted"),
        [7, 8],
        lambda examples: transfer.only_classes(examples, [7, 8]),
        -bias.SHIFTS,
        {"test_error_percent": (47.3, 13.2), "bias_shift": (None, -7.6)},
    )


def _omission(
    context: Context,
    epochs: int,
    names: tuple[str, str, str],
    classes: Sequence[int],
    select: Callable[[Examples], Examples],
    shifts: np.ndarray,
    published: Published,
) -> list[Row]:
    """Rows as learned, and with the classes' biases shifted three ways.

    By what is best on the test set, as in the paper; and, ours, from the classes' prior, without a
    label; and by what is best on validation data, where some are held out.
    """
    config, data = context.config, load_data(context.config)
    table, label, shifted = names
    net = ConfigDict({**config.omissions.to_dict(), "epochs": epochs})
    examples = [select(e) for e in with_soft_targets(context, data.train, net.temperature)]
    variant = {"temperature": net.temperature, "hard_weight": net.hard_weight}
    nets = train(context, "student", net, examples, train_step.distillation_loss, [variant])
    prior = float(np.isin(data.train["label"], classes).mean())

    def by_validation(seed: int) -> float:
        held_out = nets.member(seed).logits(data.validation["inputs"])
        return bias.best_shift(held_out, data.validation["label"], classes, shifts)

    on_test = [nets.member(s).logits(data.test["inputs"]) for s in range(len(config.seeds))]
    ways: list[tuple[str, str | None, Callable[[int], float]]] = [
        (label, None, lambda s: 0.0),
        (
            f"{label}, {shifted} (best on test)",
            "test",
            lambda s: bias.best_shift(on_test[s], data.test["label"], classes, shifts),
        ),
        (
            f"{label}, {shifted} (class prior)",
            None,
            lambda s: bias.prior_shift(nets.member(s).logits(data.train["inputs"]), classes, prior),
        ),
    ]
    if len(data.validation["id"]):
        ways.append((f"{label}, {shifted} (validation)", "validation", by_validation))
    rows = []
    for place, (row, selection, find_shift) in enumerate(ways):
        chosen = [find_shift(s) for s in range(len(config.seeds))]
        measured = [
            _measure(logits, data.test["label"], classes, shift)
            for logits, shift in zip(on_test, chosen, strict=True)
        ]
        for metric, paper in published.items():
            if place == 0 and metric == "bias_shift":
                continue
            values = [numbers[metric] for numbers in measured]
            value = paper[place] if place < 2 else None
            rows.append(
                make_row(config, table, row, metric, values, nets.seconds, value, selection)
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
