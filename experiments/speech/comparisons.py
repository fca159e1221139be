"""What the paper says beside its tables: temperatures, a small student; and the compressed store."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import soft_targets, step_losses, train_step
from distill_jax.data.images import Examples
from distill_jax.nets import Net
from distill_jax.soft_targets import Kept
from distill_jax.soft_targets.compare import against_dense
from experiments.common import costs
from experiments.common.config import changed
from experiments.common.study import Context, Row, make_row
from experiments.speech import frames, nets, training_set
from experiments.speech.data import load_data


def temperature(context: Context) -> list[Row]:
    """Students at each temperature; validation picks (section 4 tried 1, 2, 5, 10 and used 2)."""
    config, data = context.config, load_data(context.config)
    epochs, students = config.temperature.epochs, config.distilled.epochs
    length = "" if epochs in (0, students) else f", {epochs} epochs"
    rows, validation = [], {}
    for value in config.soft_targets.temperatures:
        trained = at_temperature(context, value)
        validation[value] = nets.frame_accuracies(trained, data, "validation")
        for metric, found in (
            ("frame_accuracy", nets.frame_accuracies(trained, data)),
            ("validation_frame_accuracy", validation[value]),
        ):
            rows.append(
                make_row(
                    config,
                    "speech_temperature",
                    f"T={value:g}{length}",
                    metric,
                    found,
                    seconds=trained.seconds,
                    temperature=value,
                )
            )
    best = max(validation, key=lambda value: validation[value].mean())
    row = "picked by validation"
    return [
        *rows,
        make_row(
            config,
            "speech_temperature",
            row,
            "temperature",
            [best],
            seconds=0.0,
            paper=2.0,
            selection="validation",
        ),
    ]


def compression(context: Context) -> list[Row]:
    """Dense soft targets, the k largest, and drawn classes of as many bytes: errors and students."""
    config, data = context.config, load_data(context.config)
    net, seeds = config.compression, len(config.seeds)
    log_probs, examples = _dense_targets(context)
    probabilities = jnp.exp(jnp.asarray(log_probs))
    mean = jnp.mean(probabilities, axis=0)

    def student(row: str, targets: Sequence[Examples], loss: train_step.Loss) -> Net:
        print(f"compression, {row}", flush=True)
        joined = [{**examples, **own} for own in targets]
        # A seed's students begin alike and see the same batches: their keys are the same.
        variant = {"temperature": net.temperature, "hard_weight": net.hard_weight}
        directory = context.directory / row.replace("=", "_")
        return nets.train(
            context, "student", net, joined, loss, variants=[variant], directory=directory
        )

    targets = {"teacher_logits": log_probs * np.float32(net.temperature)}
    dense = student("dense", [targets] * seeds, step_losses.distillation_loss)
    rows = _compression_rows(config, "dense", 4 * data.num_classes + _DIGEST, dense, {})
    some = np.arange(len(log_probs))[:: -(-len(log_probs) // _COMPARED)]
    logits = jnp.asarray(nets.log_probs(dense.some(0, 1), frames.select(examples, some)))
    for k in net.k:
        if k >= data.num_classes:
            print(f"compression, k={k}: left out, there are {data.num_classes} classes", flush=True)
            continue
        for row, size, kept in _encodings(probabilities, k, examples["id"], max(2, seeds)):
            part = jax.tree.map(lambda field: field[some], kept[:4])
            found = against_dense(probabilities[some], part, logits, net.temperature, mean)
            # No divergence where a class is not drawn.
            errors = {name: [float(x)] for name, x in found.items() if np.isfinite(x)}
            # Every student has draws of its own, so that the spread over seeds has theirs too.
            own = [map(np.asarray, kept[seed % len(kept)]) for seed in range(seeds)]
            fields = [dict(zip(soft_targets.TOP_K_FIELDS, one, strict=True)) for one in own]
            trained = student(row, fields, step_losses.top_k_distillation_loss(mean))
            less = nets.frame_accuracies(trained, data) - nets.frame_accuracies(dense, data)
            measured = {**errors, "frame_accuracy_less_dense": less}
            rows += _compression_rows(config, row, size, trained, measured)
    return rows


def unlabelled(context: Context) -> list[Row]:
    """Small students of one large net: Li et al.'s T = 1 without labels, and ours beside it.

    The large net is the ensemble's first member.
    """
    config, data = context.config, load_data(context.config)
    net = config.unlabelled
    seeds = config.seeds[: net.seeds]
    large = nets.accuracies(nets.load_ensemble(context).some(0, 1), data.test)
    small = nets.train(
        context,
        "small",
        net,
        training_set.labelled(config, net, len(seeds)),
        step_losses.label_loss,
        seeds=seeds,
        number=1,  # the students are 0
    )
    base = nets.frame_accuracies(small, data)
    table = "speech_unlabelled"
    rows = [
        make_row(config, table, "large net, labels", "frame_accuracy", large, seconds=0.0),
        make_row(
            config,
            table,
            "small net, labels",
            "frame_accuracy",
            base,
            seconds=small.seconds / len(seeds),
        ),
    ]
    # Li et al.'s way, and ours without labels and with them; once each where they are the same.
    ways = dict.fromkeys([(1.0, 0.0), (net.temperature, 0.0), (net.temperature, net.hard_weight)])
    for value, weight in ways:
        paper = 28.0 if (value, weight) == (1.0, 0.0) else None
        name = f"one_temperature_{value:g}_{weight:g}"
        trained = nets.distil(
            context, name, net, value, seeds=seeds, hard_weight=weight, store="one"
        )
        found = nets.frame_accuracies(trained, data)
        share = 100.0 * (found - base) / (large - base)
        labels = f"labels at {weight:g}" if weight else "no labels"
        row = f"small net, soft targets of the large one, T={value:g}, {labels}"
        seconds = trained.seconds / len(seeds)
        rows.append(make_row(config, table, row, "frame_accuracy", found, seconds=seconds))
        rows.append(
            make_row(config, table, row, "gap_closed_percent", share, seconds=seconds, paper=paper)
        )
    return rows


def costs_of_nets(context: Context) -> list[Row]:
    """What the ensemble, one of its nets and the student cost; their predictions of test frames."""
    config, test = context.config, load_data(context.config).test
    ensemble = nets.load_ensemble(context)
    candidates = [
        costs.Candidate(
            f"{ensemble.members}xEnsemble", nets.mean_log_probs(ensemble.model), ensemble.params
        ),
        costs.of_net("baseline", ensemble),
        costs.of_net("distilled", nets.load_students(context)),
    ]
    rows = np.flatnonzero(test["label"] >= 0)[: costs.MOST]
    inputs = np.asarray(frames.gather_windows(test, jnp.asarray(rows))["inputs"])
    return costs.rows(config, "speech_costs", candidates, inputs, test["label"][rows])


def at_temperature(context: Context, value: float) -> Net:
    """Students of the first seeds; or those of Table 1, which are finished, if they are like them."""
    net, own = context.config.distilled, context.config.temperature
    epochs = own.epochs or net.epochs
    if value == net.temperature and epochs == net.epochs:
        return nets.load_students(context)
    shorter = changed(net, epochs=epochs)
    seeds = context.config.seeds[: own.seeds]
    return nets.distil(context, f"temperature_{value:g}", shorter, value, seeds=seeds)


def _dense_targets(context: Context) -> tuple[np.ndarray, Examples]:
    """The logarithm of a part's soft targets at a temperature `[n, C]`, and that part's examples."""
    config = context.config
    net = config.compression
    teacher = nets.load_ensemble(context)
    examples = training_set.random_parts(config, net.percent, (0,))[0]
    apply = nets.mean_log_probs(teacher.model, net.temperature, config.soft_targets.mean)
    rows = np.arange(len(examples["label"]))
    return frames.logits_over_windows(apply, teacher.params, examples, rows), examples


def _encodings(
    probabilities: Array, k: int, ids: np.ndarray, repeats: int
) -> Iterator[tuple[str, int, list[Kept]]]:
    """The k largest, and independent draws of as many bytes: name, bytes a frame as stored, fields."""
    largest = _top_k(probabilities, k)
    size = sum(field[0].nbytes for field in largest)
    yield f"k={k}", size + _DIGEST, [largest]
    draws = soft_targets.most_draws(size, probabilities.shape[-1])
    offsets = [soft_targets.offsets(seed, ids) for seed in range(repeats)]
    drawn = [
        soft_targets.as_targets(np.asarray(_sample(probabilities, draws, one))) for one in offsets
    ]
    yield f"draws={draws}", size + _DIGEST, drawn


def _compression_rows(
    config: ConfigDict,
    row: str,
    size: int,
    trained: Net,
    measured: Mapping[str, Sequence[float] | np.ndarray],
) -> list[Row]:
    """The rows of one form of the targets, with its size to be plotted against."""
    found, seconds = nets.frame_accuracies(trained, load_data(config)), trained.seconds
    values = {"bytes_per_frame": [size], **measured, "frame_accuracy": found}
    return [
        make_row(config, "speech_compression", row, metric, numbers, seconds=seconds, bytes=size)
        for metric, numbers in values.items()
    ]


_COMPARED = 4096  # examples, at most
_DIGEST = 8  # bytes of a stored example that say which input it is of
_top_k = jax.jit(soft_targets.top_k, static_argnames="k")
_sample = jax.jit(soft_targets.sample, static_argnames="draws")
