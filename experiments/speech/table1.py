"""Table 1 of the paper: one net, the ensemble, and one net distilled from it."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from distill_jax import compressed_targets, models, train_step
from distill_jax.soft_targets import Mean
from experiments.common import members
from experiments.common.study import Context, Row, make_row, read_json, write_json
from experiments.speech import frames, nets, training_set
from experiments.speech.data import Data, load_data

_SHARD_RUNS = 64  # at most so many groups of the stage that writes soft targets


def ensemble(context: Context) -> list[Row]:
    """Nets that differ in their seeds alone: each is a baseline, together they are the teacher."""
    config, data = context.config, load_data(context.config)
    groups = nets.train_ensemble(context)
    net = nets.stack(groups)
    count = len(config.ensemble.members)
    size = models.parameter_count(net.params) // count
    print(f"{data.num_classes} states, {size:,} parameters in each of {count} nets")
    seconds = sum(group.seconds for group in groups)
    single = np.concatenate([nets.frame_accuracies(group, data) for group in groups])
    log_probs = _member_log_probs(net, data)
    arithmetic = {
        number: [
            nets.accuracy(_mean(log_probs[start : start + number], "arithmetic"), data.test)
            for start in range(0, count - number + 1, number)
        ]
        for number in sorted({1, 2, 5, count})
        if number <= count
    }
    together = arithmetic[count][0]
    write_json(
        context.directory / "accuracy.json", {"baseline": single.mean(), "ensemble": together}
    )
    each = seconds / count
    rows = [
        make_row(config, "speech", "baseline", "frame_accuracy", single, each, 58.9),
        make_row(
            config, "speech", f"{count}xEnsemble", "frame_accuracy", [together], seconds, 61.1
        ),
        *unheard_rows(context, "baseline", net, each),
    ]
    for number, found in arithmetic.items():
        row = f"ensemble of {number}, arithmetic mean"
        rows.append(
            make_row(
                config, "speech_mean", row, "frame_accuracy", found, each * number, size=number
            )
        )
    geometric = nets.accuracy(_mean(log_probs, "geometric"), data.test)
    row = f"ensemble of {count}, geometric mean"
    return [*rows, make_row(config, "speech_mean", row, "frame_accuracy", [geometric], seconds)]


def make_soft_targets(context: Context) -> list[Row]:
    """The ensemble's soft targets over the training set at each temperature, stored once."""
    for name in _write_soft_targets(context):
        store = nets.load_targets(context.config, context.directory / name)
        text = f"{name}: {compressed_targets.bytes_per_example(store)} bytes a frame"
        if store.tail:
            tail = 100.0 * float(np.mean(np.concatenate(store.tail)))
            text += f", {tail:.1f} % of the probability in the tail"
        print(text)
    return []


def soft_target_groups(context: Context) -> list[Callable[[], list[str]]]:
    """What writes each run of shards of all these stores, for independent processes."""
    shards = range(nets.shard_count(context.config))
    size = math.ceil(len(shards) / _SHARD_RUNS)
    runs = [shards[start : start + size] for start in range(0, len(shards), size)]
    return [functools.partial(_write_soft_targets, context, run) for run in runs]


def _write_soft_targets(context: Context, shards: Sequence[int] | None = None) -> list[str]:
    """Writes all shards of all stores, or only some; the names of the stores."""
    config, net = context.config, nets.load_ensemble(context)
    teacher = nets.fingerprint(net, config.ensemble)
    temperatures = config.soft_targets.temperatures
    stores = {value: store_name(value) for value in temperatures}
    nets.write_targets(context, net, stores, config.soft_targets.mean, teacher, shards)
    # One large net's, for a small one to learn from.
    small = {value: f"one_{store_name(value)}" for value in {1.0, config.unlabelled.temperature}}
    one = nets.first(net, 1)
    nets.write_targets(context, one, small, None, f"{teacher}, member 0", shards)
    return [*stores.values(), *small.values()]


def distilled(context: Context) -> list[Row]:
    """One net of the members' size, distilled from all of them; and the share of their gain it has."""
    config, data = context.config, load_data(context.config)
    net = config.distilled
    trained = distil(context, "distilled", net, net.temperature, config.seeds)
    found = nets.frame_accuracies(trained, data)
    before = read_json(context.inputs["ensemble"] / "accuracy.json")
    gain = before["ensemble"] - before["baseline"]
    share = 100.0 * (found - before["baseline"]) / gain
    row, seconds = f"distilled, T={net.temperature:g}", trained.seconds / len(config.seeds)
    return [
        make_row(config, "speech", row, "frame_accuracy", found, seconds, 60.8),
        make_row(config, "speech", row, "gain_transferred_percent", share, seconds, 86.4),
        *unheard_rows(context, row, nets.Net(trained.model, trained.params), seconds),
        *_control(context),
    ]


def _control(context: Context) -> list[Row]:
    """One more baseline, trained on labels for as many epochs as the students, if those are others."""
    config = context.config
    net, epochs = config.ensemble, config.distilled.epochs
    if epochs == net.epochs:
        return []
    trained = nets.train(
        context,
        "control",
        ConfigDict({**net.to_dict(), "epochs": epochs, "report_every": 1}),
        training_set.labelled(config, net, 1),
        train_step.label_loss,
        seeds=net.members[:1],
    )
    found = nets.frame_accuracies(trained, load_data(config))
    row = f"baseline, {epochs} epochs like the distilled"
    return [make_row(config, "speech", row, "frame_accuracy", found, trained.seconds)]


def distil(
    context: Context,
    name: str,
    net: ConfigDict,
    temperature: float,
    seeds: Sequence[int],
    hard_weight: float | None = None,
    store: str | None = None,
) -> members.Net:
    """Nets trained on stored soft targets of the whole training set; by default the ensemble's."""
    folder = context.inputs["soft_targets"] / (store or store_name(temperature))
    targets = nets.load_targets(context.config, folder)
    weight = net.hard_weight if hard_weight is None else hard_weight
    return nets.train_on_targets(context, name, net, targets, temperature, weight, seeds)


def store_name(temperature: float) -> str:
    """The folder of a temperature's soft targets."""
    return f"temperature_{temperature:g}"


def unheard_rows(context: Context, row: str, net: nets.Net, seconds: float) -> list[Row]:
    """Accuracy on speakers who are in training and on those who are not; none if all are of a kind."""
    data = load_data(context.config)
    rows = []
    for name, chosen in (("heard", ~data.unheard), ("unheard", data.unheard)):
        if chosen.any() and not chosen.all():
            part = frames.select(data.test, np.flatnonzero(chosen))
            found = nets.accuracies(net, part)
            metric = f"frame_accuracy_{name}_speakers"
            rows.append(make_row(context.config, "speech", row, metric, found, seconds))
    return rows


def _member_log_probs(net: nets.Net, data: Data) -> np.ndarray:
    """Every member's log-probabilities of the test frames `[M, N, C]`."""
    count = nets.member_count(net)
    return np.stack([nets.log_probs(nets.first(net, 1, m), data.test) for m in range(count)])


def _mean(log_probs: np.ndarray, mean: Mean) -> np.ndarray:
    """The members' mean `[N, C]`, up to a constant: enough for the most probable state."""
    return np.exp(log_probs).mean(axis=0) if mean == "arithmetic" else log_probs.mean(axis=0)
