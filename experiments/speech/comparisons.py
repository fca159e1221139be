"""What the paper says beside its tables: temperatures, a small student; and the compressed store."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import compressed_targets, training
from distill_jax.data import frames
from distill_jax.data.sources import Examples
from experiments import members
from experiments.speech import nets, training_set
from experiments.speech.data import load_data
from experiments.speech.table1 import distil, store_name
from experiments.study import Context, Row, make_row


def temperature(context: Context) -> list[Row]:
    """Students at each temperature; validation picks (section 4 tried 1, 2, 5, 10 and used 2)."""
    config, data = context.config, load_data(context.config)
    rows, validation = [], {}
    for value in config.soft_targets.temperatures:
        trained = _at_temperature(context, value)
        validation[value] = nets.frame_accuracies(trained, data, "validation")
        for metric, found in (
            ("frame_accuracy", nets.frame_accuracies(trained, data)),
            ("validation_frame_accuracy", validation[value]),
        ):
            rows.append(
                make_row(
                    config,
                    "speech_temperature",
                    f"T={value:g}",
                    metric,
                    found,
                    trained.seconds,
                    temperature=value,
                )
            )
    best = max(validation, key=lambda value: validation[value].mean())
    row = "picked by validation"
    return [
        *rows,
        make_row(config, "speech_temperature", row, "temperature", [best], 0.0, 2.0, "validation"),
    ]


def compression(context: Context) -> list[Row]:
    """Dense soft targets against the k largest: what differs, and what a student makes of them."""
    config, data = context.config, load_data(context.config)
    net = config.compression
    log_probs, examples = _dense_targets(context)
    probabilities = jnp.exp(jnp.asarray(log_probs))
    mean = jnp.mean(probabilities, axis=0)

    def add(row: str, metric: str, values: Any, seconds: float = 0.0) -> None:
        rows.append(make_row(config, "speech_compression", row, metric, values, seconds))

    def student(name: str, fields: Examples, loss: training.Loss) -> members.Trained:
        variant = {"temperature": net.temperature, "hard_weight": net.hard_weight}
        joined = [{**examples, **fields}] * len(config.seeds)
        return nets.train(context, name, net, joined, loss, [variant])

    rows: list[Row] = []
    fields = {"teacher_logits": log_probs * np.float32(net.temperature)}
    trained = student("dense", fields, training.distillation_loss)
    add("dense", "bytes_per_frame", [4 * data.num_classes])
    add("dense", "frame_accuracy", nets.frame_accuracies(trained, data), trained.seconds)
    some = np.arange(min(4096, len(log_probs)))
    one = nets.first(nets.Net(trained.model, trained.params), 1)
    logits = jnp.asarray(nets.log_probs(one, frames.select(examples, some)))
    for k in [k for k in net.k if k < data.num_classes]:
        kept = jax.jit(compressed_targets.top_k, static_argnums=1)(probabilities, k)
        fields = dict(zip(training.TOP_K_FIELDS, map(np.asarray, kept), strict=True))
        trained = student(f"k_{k}", fields, training.top_k_distillation_loss(mean))
        error = compressed_targets.compare(probabilities[some], k, logits, net.temperature, mean)
        add(f"k={k}", "bytes_per_frame", [sum(x[0].nbytes for x in fields.values())])
        for metric, value in error.items():
            add(f"k={k}", metric, [float(value)])
        add(f"k={k}", "frame_accuracy", nets.frame_accuracies(trained, data), trained.seconds)
    return rows


def unlabelled(context: Context) -> list[Row]:
    """A small student of one large net: Li et al.'s T = 1 without labels, and ours beside it."""
    config, data = context.config, load_data(context.config)
    net = config.unlabelled
    seeds = config.seeds[:1]
    large = nets.accuracies(nets.first(nets.load_ensemble(context), 1), data.test)
    small = nets.train(
        context,
        "small",
        net,
        training_set.labelled(config, net, 1),
        training.label_loss,
        seeds=seeds,
    )
    base = nets.frame_accuracies(small, data)
    table = "speech_unlabelled"
    rows = [
        make_row(config, table, "large net, labels", "frame_accuracy", large, 0.0),
        make_row(config, table, "small net, labels", "frame_accuracy", base, small.seconds),
    ]
    for value, weight, paper in (
        (1.0, 0.0, 28.0),
        (net.temperature, 0.0, None),
        (net.temperature, net.hard_weight, None),
    ):
        store = f"one_{store_name(value)}"
        trained = distil(context, f"{store}_{weight:g}", net, value, seeds, weight, store)
        found = nets.frame_accuracies(trained, data)
        share = 100.0 * (found - base) / (large - base)
        labels = f"labels at {weight:g}" if weight else "no labels"
        row = f"small net, soft targets of the large one, T={value:g}, {labels}"
        seconds = trained.seconds
        rows.append(make_row(config, table, row, "frame_accuracy", found, seconds))
        rows.append(make_row(config, table, row, "gap_closed_percent", share, seconds, paper))
    return rows


def _at_temperature(context: Context, value: float) -> members.Trained:
    """A student of the first seed; or all those of Table 1, which were trained before."""
    config = context.config
    if value == config.distilled.temperature:
        finished = context._replace(directory=context.inputs["distilled"])
        return distil(finished, "distilled", config.distilled, value, config.seeds)
    return distil(context, store_name(value), config.distilled, value, config.seeds[:1])


def _dense_targets(context: Context) -> tuple[np.ndarray, Examples]:
    """The logarithm of a part's soft targets at a temperature `[n, C]`, and that part's cases."""
    config = context.config
    net = config.compression
    teacher = nets.load_ensemble(context)
    examples = training_set.random_parts(config, net.percent, (0,))[0]
    apply = nets.mean_log_probs(teacher.model, net.temperature, config.soft_targets.mean)
    rows = np.arange(len(examples["label"]))
    return frames.logits_over_windows(apply, teacher.params, examples, rows), examples
