"""Table 5 of the paper: soft targets as regularizers, with 3 % of the data (section 6)."""

from collections.abc import Sequence

import jax
import numpy as np

from distill_jax import step_losses
from distill_jax.data.images import Examples
from distill_jax.loop import Record
from distill_jax.nets import Net
from experiments.common.study import Context, Row, make_row, write_json
from experiments.speech import intervals, nets, table1, training_set
from experiments.speech.data import load_data

_METRICS = ("train_frame_accuracy", "frame_accuracy")


def fractions(context: Context) -> list[Row]:
    """Little data with hard targets and with soft ones, side by side with all data."""
    config, data = context.config, load_data(context.config)
    net = config.fractions
    seeds = len(config.seeds)
    store = nets.load_targets(config, context.inputs["soft_targets"] / "ensemble")
    examples = [
        training_set.part_with_targets(config, own, store, net.temperature)
        for own in training_set.random_parts(config, net.percent, config.seeds)
    ]
    trained = nets.train(
        context,
        "part",
        net,
        examples,
        step_losses.top_k_distillation_loss(store.tail_weights[net.temperature]),
        variants=[
            {"temperature": net.temperature, "hard_weight": weight}
            for weight in (1.0, net.hard_weight)
        ],
    )
    history = trained.history
    train = 100.0 * (1.0 - np.array([record["train_errors"] for record in history]))
    test = _accuracies(history, "test_errors", nets.known_frames(data.test))
    validation = _accuracies(history, "validation_errors", nets.known_frames(data.validation))
    hard, soft = slice(0, seeds), slice(seeds, 2 * seeds)
    epochs = [record["unit"] * net.report_every for record in history]
    write_json(
        context.directory / "curves.json",
        {
            name: {"epoch": epochs, "train": train[:, of].tolist(), "test": test[:, of].tolist()}
            for name, of in (("hard", hard), ("soft", soft))
        },
    )
    # Training accuracies are of the finished nets; the one to stop at has that of when it was training.
    final = _on_own_parts(trained, examples)
    best, each = validation[:, hard].argmax(axis=0), np.arange(seeds)
    few = f"{net.percent:g} % of the training set"
    seconds = trained.seconds / (2 * seeds)
    rows = _all_data(context, examples[0])
    for row, selection, *found in (
        (
            f"hard targets, {few}, early stopping",
            "validation",
            (train[best, each], 67.3),
            (test[best, each], 44.5),
        ),
        (f"hard targets, {few}, last epoch", "last", (final[hard], None), (test[-1, hard], None)),
        (f"soft targets, {few}, last epoch", "last", (final[soft], 65.4), (test[-1, soft], 57.0)),
    ):
        for metric, (values, paper) in zip(_METRICS, found, strict=True):
            rows.append(
                make_row(
                    config,
                    "speech_fraction",
                    row,
                    metric,
                    values,
                    seconds=seconds,
                    paper=paper,
                    selection=selection,
                )
            )
    return [*rows, _kept(context, trained, soft, f"soft targets, {few}, last epoch", seconds)]


def _kept(context: Context, trained: Net, soft: slice, row: str, seconds: float) -> Row:
    """The share of the full data's accuracy that soft targets on few of them reach, per cent."""
    config, test = context.config, load_data(context.config).test
    few = trained._replace(
        params=jax.tree.map(lambda leaf: leaf[soft], trained.params),
        members=soft.stop - soft.start,
    )
    right = np.stack([intervals.count_right(own, test) for own in nets.states(few, test)])
    whole = np.load(context.inputs["ensemble"] / table1.RIGHT)["members"].mean(axis=0)
    return make_row(
        config,
        "speech_fraction",
        row,
        "kept_percent_of_all_data",
        100.0 * right.sum(axis=1) / whole.sum(),
        seconds=seconds,
        paper=96.8,
        interval=intervals.percent(right.mean(axis=0), whole),
    )


def _on_own_parts(trained: Net, examples: Sequence[Examples]) -> np.ndarray:
    """Frame accuracy of each net `[M]` on the part that it was trained on, per cent."""
    seeds = len(examples)
    found = []
    for s, own in enumerate(examples):
        params = jax.tree.map(lambda leaf, s=s: leaf[s::seeds], trained.params)
        found.append(nets.accuracies(trained._replace(params=params), own))
    return np.stack(found, axis=1).ravel()


def _all_data(context: Context, some: Examples) -> list[Row]:
    """The ensemble's members once more: all data, hard targets; on some of their training examples."""
    config, data = context.config, load_data(context.config)
    ensemble = nets.load_ensemble(context)
    train = nets.accuracies(ensemble, some)
    test = nets.frame_accuracies(ensemble, data)
    seconds = ensemble.seconds / len(test)
    return [
        make_row(
            config,
            "speech_fraction",
            "hard targets, all data",
            metric,
            values,
            seconds=seconds,
            paper=paper,
        )
        for metric, (values, paper) in zip(_METRICS, ((train, 63.4), (test, 58.9)), strict=True)
    ]


def _accuracies(history: Sequence[Record], metric: str, size: int) -> np.ndarray:
    """Frame accuracies by epoch and member, per cent, from counted errors."""
    return 100.0 * (1.0 - np.array([record[metric] for record in history]) / size)
