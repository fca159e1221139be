"""Table 1 of the paper: one net, the ensemble, and one net distilled from it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_jax import models, soft_targets, step_losses
from distill_jax.nets import Net, stack
from distill_jax.soft_targets.reduction import array_name
from experiments.common.config import changed
from experiments.common.statistics import standard_error
from experiments.common.study import Context, Row, make_row, read_json, write_arrays, write_json
from experiments.speech import differences, embedded_test, frames, intervals, nets, training_set
from experiments.speech.data import Data, load_data

RIGHT = "right.npz"
"""What the stage "ensemble" keeps: by utterance, the right frames of members and ensemble, and all."""

_SHARD_RUNS = 64  # at most so many groups of the stage that writes soft targets


def ensemble(context: Context) -> list[Row]:
    """Nets that differ in their seeds alone: each is a baseline, together they are the teacher."""
    config, data = context.config, load_data(context.config)
    net = stack([train_group() for train_group in nets.ensemble_groups(context)])
    count = len(config.ensemble.members)
    size = models.parameter_count(net.params) // count
    print(f"{data.num_classes} states, {size:,} parameters in each of {count} nets")
    seconds, single = net.seconds, nets.frame_accuracies(net, data)
    arithmetic, geometric = states_of_means(net, data)
    together = nets.accuracy(arithmetic[count][0], data.test)
    write_json(
        context.directory / "accuracy.json", {"baseline": single.mean(), "ensemble": together}
    )
    members, frame_counts = _right(arithmetic[1], data), intervals.count_frames(data.test)
    ensemble_right = intervals.count_right(arithmetic[count][0], data.test)
    write_arrays(
        context.directory / RIGHT, members=members, ensemble=ensemble_right, frames=frame_counts
    )
    each = seconds / count
    rows = [
        make_row(
            config,
            "speech",
            "baseline",
            "frame_accuracy",
            single,
            seconds=each,
            paper=58.9,
            interval=intervals.percent(members.mean(axis=0), frame_counts),
        ),
        make_row(
            config,
            "speech",
            f"{count}xEnsemble",
            "frame_accuracy",
            [together],
            seconds=seconds,
            paper=61.1,
            interval=intervals.percent(ensemble_right, frame_counts),
        ),
        *unheard_rows(context, "baseline", net, each),
    ]
    for number, found in arithmetic.items():
        rows.append(
            make_row(
                config,
                "speech_mean",
                f"ensemble of {number}, arithmetic mean",
                "frame_accuracy",
                [nets.accuracy(states, data.test) for states in found],
                seconds=each * number,
                size=number,
            )
        )
    row, accuracy = f"ensemble of {count}, geometric mean", nets.accuracy(geometric, data.test)
    return [
        *rows,
        make_row(config, "speech_mean", row, "frame_accuracy", [accuracy], seconds=seconds),
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
    counts = {
        "baseline": (right := np.load(context.inputs["ensemble"] / RIGHT))["members"],
        f"{len(config.ensemble.members)}xEnsemble": right["ensemble"][None],
        row: _right(nets.states(trained, data.test), data),
    }
    base, top, own = (each.mean(axis=0) for each in counts.values())
    error = error_of_share(counts["baseline"], top, counts[row])

    def of_students(metric: str, values: Sequence[float] | np.ndarray, **more: Any) -> Row:
        return make_row(config, "speech", row, metric, values, seconds=seconds, **more)

    return [
        of_students(
            "frame_accuracy", found, paper=60.8, interval=intervals.percent(own, right["frames"])
        ),
        of_students(
            "gain_transferred_percent",
            share,
            paper=86.4,
            interval=intervals.percent(own - base, top - base),
        ),
        *([of_students("gain_transferred_standard_error", [error])] if error is not None else []),
        *unheard_rows(context, row, trained, seconds),
        *embedded_test.rows(context, row, trained, seconds),
        *_control(context),
        *differences.rows(config, "frame_accuracy", counts, right["frames"]),
    ]


def error_of_share(base: np.ndarray, top: np.ndarray, own: np.ndarray) -> float | None:
    """The standard error of the share of the gain, per cent, from the spread of members and students.

    The share is (own - base) / (top - base), with right frames of nets `[M, U]` and of the one ensemble
    `[U]`. The ensemble is taken as it is. None where there is one net of a kind.
    """
    if min(len(base), len(own)) < 2:
        return None
    members, students = base.sum(axis=1), own.sum(axis=1)
    gain = top.sum() - members.mean()
    of_members = standard_error(members) * (top.sum() - students.mean()) / gain**2
    return 100.0 * float(np.hypot(standard_error(students) / gain, of_members))


def _control(context: Context) -> list[Row]:
    """One more baseline, trained on labels for as many epochs as the students, if those are others."""
    config = context.config
    net, epochs = config.ensemble, config.distilled.epochs
    if epochs == net.epochs:
        return []
    trained = nets.train(
        context,
        "control",
        changed(net, epochs=epochs, report_every=1),
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


def states_of_means(net: Net, data: Data) -> tuple[dict[int, list[np.ndarray]], np.ndarray]:
    """The most probable states of the test frames `[N]`, by ensembles of the members.

    One member after another: all members' probabilities would not fit in memory.

    Returns:
        By size of the arithmetic mean those of each ensemble, no member in two of a size; and those of
        the geometric mean of all.
    """
    count = net.members or 1
    sizes = sorted({size for size in (1, 2, 5, count) if size <= count})
    sums: dict[int, Any] = dict.fromkeys(sizes, 0.0)
    states: dict[int, list[np.ndarray]] = {size: [] for size in sizes}
    logs: Any = 0.0
    for number in range(count):
        log_probs = nets.log_probs(net.some(number, 1), data.test)
        probabilities = np.exp(log_probs)
        logs = logs + log_probs
        for size in sizes:
            sums[size] = sums[size] + probabilities
            if (number + 1) % size == 0:
                states[size].append((sums[size] / size).argmax(axis=-1))
                sums[size] = 0.0
    return states, (logs / count).argmax(axis=-1)


def _right(states: Sequence[np.ndarray], data: Data) -> np.ndarray:
    """Of each net's states, how many are right in each test utterance `[M, U]`."""
    return np.stack([intervals.count_right(own, data.test) for own in states])
