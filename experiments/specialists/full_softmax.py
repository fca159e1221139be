"""Section 6.1: a full softmax, and soft targets that keep specialists from overfitting."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from distill_jax.specialists import heads, store
from distill_jax.specialists.heads import Head
from experiments.common import statistics
from experiments.common.config import changed
from experiments.common.study import Context, Row, make_row, write_json
from experiments.specialists import generalists, training
from experiments.specialists.clusters import load_sets
from experiments.specialists.data import load_data, some_rows
from experiments.specialists.generalists import Generalist

NAMES = {
    "unit": "dustbin",
    "logsumexp": "dustbin of many outputs",
    "full_hard": "full softmax, hard targets",
    "full_soft": "full softmax, the generalist's soft targets",
}


class _Run(NamedTuple):
    """Specialists of one head and seed: their accuracies during training, and after it."""

    history: dict[str, np.ndarray]
    test_accuracy: float
    seconds: float


def soft(context: Context) -> list[Row]:
    """Specialists with each head, trained long: gains on their classes and losses on the others."""
    config, seeds = context.config, range(len(context.config.seeds))
    alone = [_generalist(context, s) for s in seeds]
    rows = [_row(config, "generalist", name, [one[name] for one in alone]) for name in alone[0]]
    curves = {}
    for kind in config.soft.kinds:
        runs = [_run(context, s, heads.head_of(kind)) for s in seeds]
        seconds, histories = sum(run.seconds for run in runs), [run.history for run in runs]
        rows += _rows(config, kind, histories, seconds)
        accuracies = [run.test_accuracy for run in runs]
        rows.append(_row(config, NAMES[kind], "test_accuracy", accuracies, seconds=seconds))
        curves[NAMES[kind]] = _curve(histories)
    write_json(context.directory / "curves.json", curves)
    return rows + _differences(config, rows)


def _differences(config: ConfigDict, rows: Sequence[Row]) -> list[Row]:
    """What soft targets add to hard ones, and what was lost to overfitting: paired, with intervals."""
    values = {(row["row"], row["metric"]): np.array(row["values"]) for row in rows}
    hard, soft = NAMES["full_hard"], NAMES["full_soft"]
    found = []
    for name, one, other in (
        ("soft less hard targets", soft, hard),
        ("hard targets, the last epoch less early stopping", hard, f"{hard}, early stopping"),
        ("soft targets, the last epoch less early stopping", soft, f"{soft}, early stopping"),
    ):
        for group in ("special", "other"):
            pair = [values.get((x, f"{group}_accuracy")) for x in (one, other)]
            if pair[0] is None or pair[1] is None:
                continue
            difference = pair[0] - pair[1]
            interval = statistics.mean_interval(difference)
            metric = f"{group}_difference"
            found.append(_row(config, name, metric, difference, interval=interval))
    return found


def _run(context: Context, seed: int, head: Head) -> _Run:
    """The first few specialists of a seed's generalist, with another head."""
    config, data = context.config, load_data(context.config)
    generalist, sets = generalists.load(context, seed), _sets(context, seed)
    enriched = training.make_enriched(context, seed, sets, head, config.soft.examples)
    evaluation = _evaluation(config, generalist, sets, head)
    net = training.train_group(
        context,
        context.directory / head.name / f"seed_{config.seeds[seed]}",
        seed,
        enriched,
        range(len(sets)),
        net=changed(config.specialists, **config.soft),
        head=head,
        evaluation=evaluation,
    )
    found = store.Specialists(net, head, sets, enriched.corrections, data.num_classes)
    q = training.predict(config, generalist, found, generalist.inputs(data.test["inputs"]))
    right = q.argmax(axis=-1) == data.test["label"]
    history = _accuracies(net.history, evaluation)
    return _Run(history, 100.0 * float(right.mean()), net.seconds)


def _sets(context: Context, seed: int) -> np.ndarray:
    return load_sets(context, seed)[: context.config.soft.count]


def _evaluation(
    config: ConfigDict, generalist: Generalist, sets: np.ndarray, head: Head
) -> dict[str, list[dict[str, Any]]]:
    """What errors are counted on while specialists learn, of each its own, by the metric's name.

    Special examples with predictions restricted to special classes, and, of a full softmax, the others
    with predictions restricted to those.
    """
    data = load_data(config)
    evaluation = {}
    for split, part in (("validation", data.validation), ("test", data.test)):
        rows = some_rows(config, len(part["id"]), config.soft.evaluated)
        inputs, label = generalist.inputs(part["inputs"][rows]), part["label"][rows]
        for group in ("special", "other"):
            if group == "other" and head.has_dustbin:
                continue
            evaluation[f"{split}_{group}_errors"] = [
                {
                    "inputs": inputs,
                    **_wanted(head, own, label, data.num_classes, group == "special"),
                }
                for own in sets
            ]
    return evaluation


def _wanted(
    head: Head, class_set: np.ndarray, label: np.ndarray, num_classes: int, special: bool
) -> dict[str, np.ndarray]:
    """Fields that `training.count_errors` reads; the network's outputs are the set's or all classes'."""
    inside = np.isin(np.arange(num_classes), class_set)
    counted = inside[label] == special
    if head != heads.UNIT:
        return {"allowed": inside == special, "wanted": label, "counted": counted}
    real = class_set[class_set < num_classes]
    place = np.searchsorted(real, np.where(counted, label, real[0]))
    allowed = np.arange(len(class_set) + 1) < len(real)
    return {"allowed": allowed, "wanted": place.astype(np.int32), "counted": counted}


def _accuracies(
    history: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, np.ndarray]:
    """Accuracies `[reports, K]`, per cent, by names such as "test_special"."""
    found = {}
    for name, examples in evaluation.items():
        errors = np.array([record[name] for record in history], np.float64)
        counts = np.array([one["counted"].sum() for one in examples])
        found[name.removesuffix("_errors")] = 100.0 * (1.0 - errors / np.maximum(counts, 1))
    found["step"] = np.array([np.ravel(record["step"])[0] for record in history])
    return found


def _generalist(context: Context, seed: int) -> dict[str, float]:
    """The generalist's accuracy on special and other classes, restricted alike; mean over the sets."""
    data, generalist = load_data(context.config), generalists.load(context, seed)
    rows = some_rows(context.config, len(data.test["id"]), context.config.soft.evaluated)
    logits = generalist.net.logits(generalist.inputs(data.test["inputs"][rows]))
    label = data.test["label"][rows]
    found: dict[str, list[float]] = {"special_accuracy": [], "other_accuracy": []}
    for class_set in _sets(context, seed):
        for name, special in (("special_accuracy", True), ("other_accuracy", False)):
            wanted = _wanted(heads.FULL_HARD, class_set, label, data.num_classes, special)
            predicted = np.where(wanted["allowed"], logits, -np.inf).argmax(axis=-1)
            found[name].append(100.0 * float((predicted == label)[wanted["counted"]].mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _rows(
    config: ConfigDict, kind: str, histories: Sequence[Mapping[str, np.ndarray]], seconds: float
) -> list[Row]:
    """After the last epoch, and where each specialist was best on validation examples of its classes."""
    rows = []
    for name, selection in (
        (NAMES[kind], "last"),
        (f"{NAMES[kind]}, early stopping", "validation"),
    ):
        for group in ("special", "other"):
            if f"test_{group}" not in histories[0]:
                continue
            values = []
            for history in histories:
                accuracy = history[f"test_{group}"]
                best = history["validation_special"].argmax(axis=0)
                at = best if selection == "validation" else np.full_like(best, len(accuracy) - 1)
                values.append(float(accuracy[at, np.arange(accuracy.shape[1])].mean()))
            rows.append(
                _row(
                    config, name, f"{group}_accuracy", values, seconds=seconds, selection=selection
                )
            )
    return rows


def _curve(histories: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Test accuracies `[reports][seeds]` while the specialists learned, as means over them."""
    curve: dict[str, Any] = {"step": histories[0]["step"].tolist()}
    for group in ("special", "other"):
        if f"test_{group}" in histories[0]:
            means = np.stack(
                [history[f"test_{group}"].mean(axis=1) for history in histories], axis=1
            )
            curve[f"{group}_accuracy"] = means.tolist()
    return curve


def _row(
    config: ConfigDict,
    row: str,
    metric: str,
    values: Sequence[float] | np.ndarray,
    *,
    seconds: float = 0.0,
    **more: Any,
) -> Row:
    """A row of the table of section 6.1 (`make_row`)."""
    return make_row(config, "specialists_soft", row, metric, values, seconds=seconds, **more)
