"""Table 1 of the paper: one net, the ensemble, and one net distilled from it."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from distill_jax import models, soft_targets, step_losses
from distill_jax.nets import Net, stack
from distill_jax.soft_targets import Mean
from distill_jax.soft_targets.reduction import array_name
from experiments.common.study import Context, Row, make_row, read_json, write_json
from experiments.speech import frames, nets, training_set
from experiments.speech.data import Data, load_data

_SHARD_RUNS = 64  # at most so many groups of the stage that writes soft targets


def ensemble(context: Context) -> list[Row]:
    """Nets that differ in their seeds alone: each is a baseline, together they are the teacher."""
    config, data = context.config, load_data(context.config)
    net = stack([train_group() for train_group in nets.ensemble_groups(context)])
    count = len(config.ensemble.members)
    size = models.parameter_count(net.params) // count
    print(f"{data.num_classes} states, {size:,} parameters in each of {count} nets")
    seconds, single = net.seconds, nets.frame_accuracies(net, data)
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
        make_row(config, "speech", "baseline", "frame_accuracy", single, seconds=each, paper=58.9),
        make_row(
            config,
            "speech",
            f"{count}xEnsemble",
            "frame_accuracy",
            [together],
            seconds=seconds,
            paper=61.1,
        ),
        *unheard_rows(context, "baseline", net, each),
    ]
    for number, found in arithmetic.items():
        row = f"ensemble of {number}, arithmetic mean"
        rows.append(
            make_row(
                config,
                "speech_mean",
                row,
                "frame_accuracy",
                found,
                seconds=each * number,
                size=number,
            )
        )
    geometric = nets.accuracy(_mean(log_probs, "geometric"), data.test)
    row = f"ensemble of {count}, geometric mean"
    return [
        *rows,
        make_row(config, "speech_mean", row, "frame_accuracy", [geometric], seconds=seconds),
    ]


def make_soft_targets(context: Context) -> list[Row]:
    """The soft targets of the ensemble, and of one net, over the training set at each temperature."""
    _write_soft_targets(context)
    for name in ("ensemble", "one"):
        store = nets.load_targets(context.config, context.directory / name)
        temperatures = store.meta["temperatures"]
        size = soft_targets.bytes_per_example(store)
        print(f"{name}: {size} bytes a frame, at {len(temperatures)} temperatures")
        if store.meta["encoding"] == "top_k":
            for t in temperatures:
                tail = np.concatenate([shard[array_name("tail", t)] for shard in store.shards])
                print(f"T={t:g}: {100.0 * tail.mean():.1f} % of the probability in the tail")
    return []


def soft_target_groups(context: Context) -> list[Callable[[], None]]:
    """What writes each run of shards of both stores, for independent processes."""
    shards = range(nets.shard_count(context.config))
    size = math.ceil(len(shards) / _SHARD_RUNS)
    runs = [shards[start : start + size] for start in range(0, len(shards), size)]
    return [functools.partial(_write_soft_targets, context, run) for run in runs]


def _write_soft_targets(context: Context, shards: Sequence[int] | None = None) -> None:
    """Writes all shards of both stores, or only some."""
    config, net = context.config, nets.load_ensemble(context)
    teacher = nets.fingerprint(net, config.ensemble)
    nets.write_targets(
        context,
        "ensemble",
        net,
        config.soft_targets.temperatures,
        mean=config.soft_targets.mean,
        teacher=teacher,
        shards=shards,
    )
    nets.write_targets(  # one large net's, for a small one to learn from
        context,
        "one",
        net.some(0, 1),
        sorted({1.0, config.unlabelled.temperature}),
        mean=None,
        teacher=f"{teacher}, member 0",
        shards=shards,
    )


def distilled(context: Context) -> list[Row]:
    """One net of the members' size, distilled from all of them; and the share of their gain it has."""
    config, data = context.config, load_data(context.config)
    net = config.distilled
    trained = nets.distil(context, "distilled", net, net.temperature, seeds=config.seeds)
    found = nets.frame_accuracies(trained, data)
    before = read_json(context.inputs["ensemble"] / "accuracy.json")
    gain = before["ensemble"] - before["baseline"]
    share = 100.0 * (found - before["baseline"]) / gain
    row, seconds = f"distilled, T={net.temperature:g}", trained.seconds / len(config.seeds)
    return [
        make_row(config, "speech", row, "frame_accuracy", found, seconds=seconds, paper=60.8),
        make_row(
            config, "speech", row, "gain_transferred_percent", share, seconds=seconds, paper=86.4
        ),
        *unheard_rows(context, row, trained, seconds),
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
        step_losses.label_loss,
        seeds=net.members[:1],
        number=1,  # the students are 0
    )
    found = nets.frame_accuracies(trained, load_data(config))
    row = f"baseline, {epochs} epochs like the distilled"
    return [make_row(config, "speech", row, "frame_accuracy", found, seconds=trained.seconds)]


def unheard_rows(context: Context, row: str, net: Net, seconds: float) -> list[Row]:
    """Accuracy on speakers who are in training and on those who are not; none if all are of a kind."""
    data = load_data(context.config)
    rows = []
    for name, chosen in (("heard", ~data.unheard), ("unheard", data.unheard)):
        if chosen.any() and not chosen.all():
            part = frames.select(data.test, np.flatnonzero(chosen))
            found = nets.accuracies(net, part)
            metric = f"frame_accuracy_{name}_speakers"
            rows.append(make_row(context.config, "speech", row, metric, found, seconds=seconds))
    return rows


def _member_log_probs(net: Net, data: Data) -> np.ndarray:
    """Every member's log-probabilities of the test frames `[M, N, C]`."""
    each = [net.some(m, 1) for m in range(net.members or 0)]
    return np.stack([nets.log_probs(one, data.test) for one in each])


def _mean(log_probs: np.ndarray, mean: Mean) -> np.ndarray:
    """The members' mean `[N, C]`, up to a constant: enough for the most probable state."""
    return np.exp(log_probs).mean(axis=0) if mean == "arithmetic" else log_probs.mean(axis=0)
