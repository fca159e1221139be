"""Section 6.1: a full softmax, and soft targets that keep specialists from overfitting."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from distill_jax.specialists import store
from experiments.common.study import Context, Row, make_row, write_json
from experiments.specialists import nets
from experiments.specialists import training as specialist_training
from experiments.specialists.clusters import load_sets
from experiments.specialists.data import load_data
from experiments.specialists.kinds import kind_of

NAMES = {
    "unit": "dustbin",
    "logsumexp": "dustbin of many outputs",
    "full_hard": "full softmax, hard targets",
    "full_soft": "full softmax, the generalist's soft targets",
}


class _Run(NamedTuple):
    """Specialists of one kind and seed: their accuracies while they learned, and what they then give."""

    history: dict[str, np.ndarray]
    test_accuracy: float
    seconds: float


def soft(context: Context) -> list[Row]:
    """Each kind of specialist, trained long: what it gains on its classes and loses on the others."""
    config, seeds = context.config, range(len(context.config.seeds))
    alone = [_generalist(context, s) for s in seeds]
    rows = [
        _row(config, "generalist", name, [one[name] for one in alone], 0.0) for name in alone[0]
    ]
    curves = {}
    for kind in config.soft.kinds:
        runs = [_run(context, s, kind) for s in seeds]
        seconds, histories = sum(run.seconds for run in runs), [run.history for run in runs]
        rows += _rows(config, kind, histories, seconds)
        accuracies = [run.test_accuracy for run in runs]
        rows.append(_row(config, NAMES[kind], "test_accuracy", accuracies, seconds))
        curves[NAMES[kind]] = _curve(histories)
    write_json(context.directory / "curves.json", curves)
    return rows


def _run(context: Context, seed: int, kind: str) -> _Run:
    """The first few specialists of a seed's generalist, in another form."""
    config, data = context.config, load_data(context.config)
    base = nets.load_bases(context)[seed]
    sets = _sets(context, seed)
    examples = specialist_training.enriched_examples(context, seed, sets)
    evaluation = _evaluation(config, base, sets, kind)
    trained = specialist_training.train_group(
        context,
        context.directory / kind / f"seed_{config.seeds[seed]}",
        seed,
        range(len(sets)),
        examples,
        ConfigDict({**config.specialists.to_dict(), **config.soft.to_dict()}),
        kind,
        evaluation,
    )
    found = store.Specialists(
        trained.params,
        sets,
        specialist_training.corrections(examples),
        {"kind": kind, "num_classes": data.num_classes},
    )
    q = specialist_training.combined(config, base, found, base.inputs(data.test["inputs"]))
    right = q.argmax(axis=-1) == data.test["label"]
    history = _accuracies(trained.history, evaluation)
    return _Run(history, 100.0 * float(right.mean()), trained.seconds)


def _sets(context: Context, seed: int) -> np.ndarray:
    return load_sets(context, seed)[: context.config.soft.count]


def _evaluation(
    config: ConfigDict, base: nets.Base, sets: np.ndarray, kind: str
) -> dict[str, list[dict[str, Any]]]:
    """What errors are counted on while specialists learn, of each its own, by the metric's name.

    Special examples with predictions restricted to special classes, and, of a full softmax, the others
    with predictions restricted to those.
    """
    data = load_data(config)
    evaluation = {}
    for split, part in (("validation", data.validation), ("test", data.test)):
        rows = _sample(config, len(part["id"]))
        inputs, label = base.inputs(part["inputs"][rows]), part["label"][rows]
        for group in ("special", "other"):
            if group == "other" and kind_of(kind).has_dustbin:
                continue
            evaluation[f"{split}_{group}_errors"] = [
                {
                    "inputs": inputs,
                    **_wanted(kind, own, label, data.num_classes, group == "special"),
                }
                for own in sets
            ]
    return evaluation


def _wanted(
    kind: str, class_set: np.ndarray, label: np.ndarray, num_classes: int, special: bool
) -> dict[str, np.ndarray]:
    """Fields that `training.count_errors` reads; the network's outputs are the set's or all classes'."""
    inside = np.isin(np.arange(num_classes), class_set)
    counted = inside[label] == special
    if kind != "unit":
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
    data, base = load_data(context.config), nets.load_bases(context)[seed]
    rows = _sample(context.config, len(data.test["id"]))
    logits, label = base.logits(base.inputs(data.test["inputs"][rows])), data.test["label"][rows]
    found: dict[str, list[float]] = {"special_accuracy": [], "other_accuracy": []}
    for class_set in _sets(context, seed):
        for name, special in (("special_accuracy", True), ("other_accuracy", False)):
            wanted = _wanted("full_hard", class_set, label, data.num_classes, special)
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
            rows.append(_row(config, name, f"{group}_accuracy", values, seconds, selection))
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


def _sample(config: ConfigDict, size: int) -> np.ndarray:
    random = np.random.default_rng(config.data.seed)
    return np.sort(random.permutation(size)[: config.soft.evaluated or size])


def _row(
    config: ConfigDict,
    row: str,
    metric: str,
    values: Sequence[float],
    seconds: float,
    selection: str = "last",
) -> Row:
    return make_row(config, "specialists_soft", row, metric, values, seconds, selection=selection)
