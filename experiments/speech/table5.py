"""Table 5 of the paper: soft targets as regularizers, with 3 % of the data (section 6)."""

from collections.abc import Sequence

import numpy as np

from distill_jax import training
from distill_jax.loop import Record
from experiments.speech import nets, training_set
from experiments.speech.data import load_data
from experiments.speech.table1 import store_name
from experiments.study import Context, Row, make_row, write_json


def fractions(context: Context) -> list[Row]:
    """Little data with hard targets and with soft ones, side by side with all data."""
    config, data = context.config, load_data(context.config)
    net = config.fractions
    seeds = len(config.seeds)
    store = nets.load_targets(config, context.inputs["soft_targets"] / store_name(net.temperature))
    examples = [
        training_set.part_with_targets(config, cases, store, net.temperature)
        for cases in training_set.random_parts(config, net.percent, config.seeds)
    ]
    history = nets.train(
        context,
        "part",
        net,
        examples,
        training.top_k_distillation_loss(store.tail_weights),
        [
            {"temperature": net.temperature, "hard_weight": weight}
            for weight in (1.0, net.hard_weight)
        ],
    ).history
    train = 100.0 * (1.0 - np.array([record["train_errors"] for record in history]))
    test = _accuracies(history, "test_errors", len(data.test["label"]))
    validation = _accuracies(history, "validation_errors", len(data.validation["label"]))
    hard, soft = slice(0, seeds), slice(seeds, 2 * seeds)
    epochs = [record["unit"] * net.report_every for record in history]
    write_json(
        context.directory / "curves.json",
        {
            name: {"epoch": epochs, "train": train[:, of].tolist(), "test": test[:, of].tolist()}
            for name, of in (("hard", hard), ("soft", soft))
        },
    )
    last = np.full(seeds, len(history) - 1)
    best = validation[:, hard].argmax(axis=0)
    few = f"{net.percent:g} % of the training set"
    rows = _all_data(context)
    for row, of, stop, paper_train, paper_test, selection in (
        (f"hard targets, {few}, early stopping", hard, best, 67.3, 44.5, "validation"),
        (f"hard targets, {few}, last epoch", hard, last, None, None, "last"),
        (f"soft targets, {few}, last epoch", soft, last, 65.4, 57.0, "last"),
    ):
        for metric, found, paper in (
            ("train_frame_accuracy", train, paper_train),
            ("frame_accuracy", test, paper_test),
        ):
            values = found[:, of][stop, np.arange(seeds)]
            seconds = history[-1]["seconds"] / (2 * seeds)
            rows.append(
                make_row(config, "speech_fraction", row, metric, values, seconds, paper, selection)
            )
    return rows


def _all_data(context: Context) -> list[Row]:
    """The ensemble's members once more: all data, hard targets."""
    config, data = context.config, load_data(context.config)
    groups = nets.train_ensemble(context, context.inputs["ensemble"])
    train = np.concatenate([np.atleast_1d(group.history[-1]["train_errors"]) for group in groups])
    test = np.concatenate([nets.frame_accuracies(group, data) for group in groups])
    seconds = sum(group.seconds for group in groups) / len(test)
    return [
        make_row(
            config, "speech_fraction", "hard targets, all data", metric, values, seconds, paper
        )
        for metric, values, paper in (
            ("train_frame_accuracy", 100.0 * (1.0 - train), 63.4),
            ("frame_accuracy", test, 58.9),
        )
    ]


def _accuracies(history: Sequence[Record], metric: str, size: int) -> np.ndarray:
    """Frame accuracies by epoch and member, per cent, from counted errors."""
    return 100.0 * (1.0 - np.array([record[metric] for record in history]) / size)
