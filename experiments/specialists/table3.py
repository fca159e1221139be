"""Tables 3 and 4: the generalist, its specialists, and controls that cost as much (section 5.5)."""

import types
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from distill_jax import losses
from distill_jax.nets import Net
from distill_jax.specialists import coverage, inference, store
from experiments.common.study import Context, Row, make_row, write_arrays
from experiments.specialists import comparison, generalists, training
from experiments.specialists.clusters import (
    load_other_sets,
    load_sets,
    other_method,
    random_sets,
)
from experiments.specialists.comparison import system
from experiments.specialists.data import Data, load_data

PAPER = types.MappingProxyType(
    {
        ("generalist", "test_accuracy"): 25.0,
        ("generalist", "conditional_test_accuracy"): 43.1,
        ("specialists", "test_accuracy"): 26.1,
        ("specialists", "conditional_test_accuracy"): 45.9,
        ("specialists", "relative_change_percent"): 4.4,
    }
)
TABLE_4 = (  # examples, change in top-1 correct, relative change, by the number of specialists
    (350037, 0, 0.0),
    (141993, 1421, 3.4),
    (67161, 1572, 7.4),
    (38801, 1124, 8.8),
    (26298, 835, 10.5),
    (16474, 561, 11.1),
    (10682, 362, 11.3),
    (7376, 232, 12.8),
    (4703, 182, 13.6),
    (4706, 208, 16.6),
    (9082, 324, 14.1),
)
_MOST = len(TABLE_4) - 1  # "10 or more"
_GALLERY = 12  # examples of each sort
_TOP = 5


def generalist(context: Context) -> list[Row]:
    """The generalists: one net of all classes for each seed."""
    trained = generalists.train_generalists(context)
    measured = generalists.accuracies(trained, load_data(context.config))
    return [
        row_of(context.config, "generalist", f"{split}_accuracy", values, trained.seconds)
        for split, values in measured.items()
        if split != "validation"
    ] + [
        row_of(
            context.config,
            "generalist",
            "training_seconds",
            [trained.seconds / len(context.config.seeds)],
            trained.seconds,
        )
    ]


def specialists(context: Context) -> list[Row]:
    """The specialists, their gain by Eq. 5, and Table 4."""
    config, data = context.config, load_data(context.config)
    runs, tables = [], []
    for s in range(len(config.seeds)):
        sets = load_sets(context, s)
        found = training.train(context, "specialists", s, sets)
        runs.append(_measure(context, s, found))
        tables.append(_coverage(data, sets, runs[-1]["right"]))
        if s == 0:
            _keep_gallery(context, data, runs[-1])
        print(
            f"seed {config.seeds[s]}: {runs[-1]['before']['test']:.2f} to "
            f"{runs[-1]['after']['test']:.2f} % of test"
        )
    name = system(config)
    rows = _rows(context, name, runs, paper=True)
    kept = {"generalist": "before", name: "after", f"{name}, n = 1": "one"}
    comparison.keep(context, {n: [run["right"][key] for run in runs] for n, key in kept.items()})
    if config.specialists.active_by != 1:
        rows += _gain_rows(config, f"{name}, n = 1", runs)
    rows += [
        row_of(
            config,
            "generalist",
            f"conditional_{split}_accuracy",
            [run["conditional"][split][0] for run in runs],
            0.0,
        )
        for split in runs[0]["conditional"]
    ]
    return rows + _coverage_rows(config, tables, sum(run["seconds"] for run in runs))


def specialist_groups(context: Context) -> list[Callable[[], Net]]:
    """What trains each group of all seeds' specialists."""
    return _groups(context, "specialists", load_sets)


def random_specialists(context: Context) -> list[Row]:
    """The same with sets of random classes, at the same cost."""
    config = context.config
    runs = []
    for s in range(len(config.seeds)):
        found = training.train(context, "random", s, _random_sets(context, s))
        runs.append(_measure(context, s, found))
    return _others(context, f"{system(config)} of random classes", runs)


def other_sets(context: Context) -> list[Row]:
    """The same with sets by the other method, K-means or greedy; nothing if it isn't asked for."""
    config = context.config
    if not config.clusters.both_methods:
        return []
    seeds = range(len(config.seeds))
    found = [training.train(context, "other", s, load_other_sets(context, s)) for s in seeds]
    runs = [_measure(context, s, one) for s, one in enumerate(found)]
    how = {"greedy": "greedily made", "kmeans": "K-means"}[other_method(config)]
    return _others(context, f"{system(config)} of {how} sets", runs)


def _others(context: Context, name: str, runs: Sequence[dict]) -> list[Row]:
    """Rows of specialists of other sets."""
    comparison.keep(context, {name: [run["right"]["after"] for run in runs]})
    return _rows(context, name, runs)


def random_groups(context: Context) -> list[Callable[[], Net]]:
    """What trains each group of all seeds' specialists of random classes."""
    return _groups(context, "random", _random_sets)


def other_groups(context: Context) -> list[Callable[[], Net]]:
    """What trains each group of all seeds' specialists by the other method."""
    wanted = context.config.clusters.both_methods
    return _groups(context, "other", load_other_sets) if wanted else []


def _groups(
    context: Context, name: str, sets_of: Callable[[Context, int], np.ndarray]
) -> list[Callable[[], Net]]:
    return [
        train
        for s in range(len(context.config.seeds))
        for train in training.groups(context, name, s, sets_of(context, s))
    ]


def _random_sets(context: Context, seed: int) -> np.ndarray:
    config = context.config
    return random_sets(config, config.seeds[seed], load_data(config).num_classes)


def _measure(context: Context, seed: int, chosen: store.Specialists) -> dict:
    """What specialists make of a seed's generalist, on all sets."""
    config, data = context.config, load_data(context.config)
    generalist = generalists.load(context, seed)
    found: dict = {"seconds": chosen.net.seconds, "before": {}, "after": {}, "one": {}}
    found["conditional"] = {}
    for split, part in data.evaluation().items():
        inputs = generalist.inputs(part["inputs"])
        logits = generalist.net.logits(inputs)
        q = inference.predict(chosen, logits, inputs, n=config.specialists.active_by)
        before, after = (x.argmax(axis=-1) == part["label"] for x in (logits, q))
        found["before"][split] = 100.0 * float(before.mean())
        found["after"][split] = 100.0 * float(after.mean())
        found["conditional"][split] = [
            conditional(np.asarray(chosen.class_sets), scores, part["label"])
            for scores in (logits, q)
        ]
        one = after
        if config.specialists.active_by != 1:
            alone = inference.predict(chosen, logits, inputs, n=1)
            one = alone.argmax(axis=-1) == part["label"]
        found["one"][split] = 100.0 * float(one.mean())
        if split == "test":
            right = {"before": before, "after": after, "one": one}
            found |= {"right": right, "logits": logits, "q": q}
    return found


def conditional(class_sets: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on the examples of special classes with predictions restricted to these, per cent.

    Over all pairs of a specialist and an example of its set (Table 3).

    Args:
        class_sets: int32 `[K, S]`, padded with C.
        scores: `[N, C]`, whose largest in a set is the prediction.
        labels: int `[N]`.
    """
    right, count = 0, 0
    for class_set in class_sets:
        real = class_set[class_set < scores.shape[1]]
        rows = np.flatnonzero(np.isin(labels, real))
        predicted = real[scores[rows][:, real].argmax(axis=-1)]
        right += int((predicted == labels[rows]).sum())
        count += len(rows)
    return 100.0 * right / max(count, 1)


def _rows(context: Context, name: str, runs: Sequence[dict], paper: bool = False) -> list[Row]:
    """Rows of a generalist with specialists, one run per seed."""
    config = context.config
    seconds = float(sum(run["seconds"] for run in runs))
    values: dict[str, list[float]] = {}
    for run in runs:
        for split in run["after"]:
            if split != "validation":
                values.setdefault(f"{split}_accuracy", []).append(run["after"][split])
                values.setdefault(f"conditional_{split}_accuracy", []).append(
                    run["conditional"][split][1]
                )
        for metric, value in gains(run["before"], run["after"]).items():
            values.setdefault(metric, []).append(value)
        values.setdefault("training_seconds", []).append(run["seconds"])
    kind = "specialists" if paper else ""
    return [
        row_of(config, name, metric, numbers, seconds, paper=PAPER.get((kind, metric)))
        for metric, numbers in values.items()
    ]


def _gain_rows(config: ConfigDict, name: str, runs: Sequence[dict]) -> list[Row]:
    """The same specialists, but active by the most probable class alone, as the paper's were."""
    changes = [gains(run["before"], run["one"]) for run in runs]
    values = {"test_accuracy": [run["one"]["test"] for run in runs]}
    values |= {metric: [one[metric] for one in changes] for metric in changes[0]}
    return [row_of(config, name, metric, numbers, 0.0) for metric, numbers in values.items()]


def gains(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Relative changes, per cent; but none of an accuracy, or of errors, that were 0."""
    change = {split: after[split] - before[split] for split in after}
    shares = {
        f"{split}_relative_change_percent".removeprefix("test_"): (change[split], before[split])
        for split in after
    }
    shares["errors_removed_percent"] = change["test"], 100.0 - before["test"]
    return {metric: 100.0 * part / whole for metric, (part, whole) in shares.items() if whole}


def _coverage(
    data: Data, sets: np.ndarray, right: Mapping[str, np.ndarray]
) -> dict[int, tuple[int, int, int]]:
    """By the number of specialists that cover the correct class: examples, right before and after."""
    covers = coverage.sets_per_class(sets, data.num_classes)[data.test["label"]]
    covers = np.minimum(covers, _MOST)
    return {
        int(cover): (
            int((covers == cover).sum()),
            int(right["before"][covers == cover].sum()),
            int(right["after"][covers == cover].sum()),
        )
        for cover in np.unique(covers)
    }


def _coverage_rows(
    config: ConfigDict, tables: Sequence[Mapping[int, tuple[int, int, int]]], seconds: float
) -> list[Row]:
    rows = []
    for cover in sorted({cover for table in tables for cover in table}):
        name = f"covered by {cover}" + (" or more" if cover == _MOST else "")
        found = [table.get(cover, (0, 0, 0)) for table in tables]
        measured: dict[str, list[float]] = {
            "examples": [n for n, _, _ in found],
            "change_in_top1_correct": [after - before for _, before, after in found],
            "relative_change_percent": [100.0 * (a - b) / b for _, b, a in found if b],
        }
        rows += [
            make_row(
                config,
                "specialists_coverage",
                name,
                metric,
                values,
                seconds=seconds,
                paper=paper,
                cover=cover,
            )
            for (metric, values), paper in zip(measured.items(), TABLE_4[cover], strict=True)
            if values
        ]
    return rows


def _keep_gallery(context: Context, data: Data, run: dict) -> None:
    """Some of the examples that the specialists corrected and broke, in the order of the test set."""
    before, after = run["right"]["before"], run["right"]["after"]
    chosen = []
    for mask in (~before & after, before & ~after):
        rows = np.flatnonzero(mask)
        random = np.random.default_rng(context.config.data.seed)
        chosen.append(np.sort(random.permutation(rows)[:_GALLERY]))
    rows = np.concatenate(chosen)
    p = np.asarray(losses.softmax(jnp.asarray(run["logits"][rows])))
    q = run["q"][rows]
    old, new = (np.argsort(-x, axis=-1)[:, :_TOP].astype(np.int32) for x in (p, q))
    write_arrays(
        context.directory / "gallery.npz",
        image=data.test["inputs"][rows],
        label=data.test["label"][rows],
        before_class=old,
        after_class=new,
        before=np.take_along_axis(p, old, axis=-1),
        after=np.take_along_axis(q, new, axis=-1),
        corrected=np.arange(len(rows)) < len(chosen[0]),
    )


def row_of(
    config: ConfigDict,
    row: str,
    metric: str,
    values: Sequence[float] | np.ndarray,
    seconds: float,
    *,
    paper: float | None = None,
) -> Row:
    """A row of Table 3 (`make_row`)."""
    if row == "generalist":
        paper = PAPER.get((row, metric))
    return make_row(config, "specialists", row, metric, values, seconds=seconds, paper=paper)
