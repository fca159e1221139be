"""Which classes each specialist gets (section 5.3); Table 2."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from distill_jax.errors import UserError
from distill_jax.specialists import clustering, coverage, greedy
from experiments.common.study import Context, Row, make_row, write_arrays, write_json
from experiments.specialists import generalists
from experiments.specialists.data import Data, load_data, some_rows

_BATCH = 2000
_NAMED = 12  # classes of a set that are named in the report
GREEDY = "by covariance, greedily"


def cluster(context: Context) -> list[Row]:
    """Class sets for every seed's generalist, and what they cover of its mistakes.

    By the covariance of its predictions, which needs no labels, with K-means and greedily; and for
    comparison by its confusions (section 7), and at random. All on training examples, but what is
    covered, on validation examples.
    """
    config, data = context.config, load_data(context.config)
    found: dict[str, list[dict[str, float]]] = {}
    for s, seed in enumerate(config.seeds):
        generalist = generalists.load(context, s)
        part = generalists.specialist_part(config)
        rows = some_rows(config, len(part["id"]), config.clusters.examples)
        inputs = generalists.training_inputs(context, s)[0][rows]
        logits, labels = generalist.net.logits(inputs), part["label"][rows]
        held_out = generalist.inputs(data.validation["inputs"])
        predicted = generalist.net.logits(held_out).argmax(axis=-1)
        matrices = {
            "covariance": clustering.prediction_covariance(
                _batches(logits), config.clusters.temperature
            ),
            "confusions": clustering.confusion(
                zip(_batches(labels), _batches(logits), strict=True), config.clusters.temperature
            ),
        }
        sets = {}
        for name, matrix in matrices.items():
            points = clustering.columns(matrix)
            centroids = clustering.online_k_means(
                points, config.clusters.count, jax.random.key(seed), config.clusters.epochs
            )
            sets[name] = _class_sets(config, points, centroids, data.num_classes)
            if name == "covariance":
                size = max(_size(config, data.num_classes), 2)
                sets[GREEDY] = greedy.greedy_sets(matrix, config.clusters.count, size)
                path = context.directory / f"seed_{seed}.npz"
                found_by = {"kmeans": sets[name], "greedy": sets[GREEDY]}
                _keep(path, data, matrix, (points, centroids), found_by)
        sets["random"] = random_sets(config, seed, data.num_classes)
        for name, chosen in sets.items():
            statistics = coverage.statistics(chosen, data.num_classes)
            share = coverage.mistakes_covered(
                chosen, data.num_classes, data.validation["label"], predicted
            )
            found.setdefault(name, []).append(
                {
                    "classes_covered_percent": 100.0 * statistics["covered"],
                    "sets_per_covered_class": statistics["mean_cover"],
                    "mistakes_covered_percent": 100.0 * share,
                }
            )
    return [
        make_row(
            config,
            "specialists_clusters",
            {"random": "at random", GREEDY: GREEDY}.get(name, f"by {name}"),
            metric,
            [one[metric] for one in values],
            seconds=0.0,
        )
        for name, values in found.items()
        for metric in values[0]
    ]


def random_sets(config: ConfigDict, seed: int, num_classes: int) -> np.ndarray:
    """As many sets of the same size, of classes that have nothing in common."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    chosen = clustering.random_sets(
        num_classes, config.clusters.count, _size(config, num_classes), key
    )
    return np.asarray(chosen, np.int32)


def load_sets(context: Context, seed: int) -> np.ndarray:
    """The class sets `[K, S]` of a seed, by the config's method."""
    return _load_sets(context, seed, context.config.clusters.method)


def load_other_sets(context: Context, seed: int) -> np.ndarray:
    """Those by the other method."""
    return _load_sets(context, seed, other_method(context.config))


def other_method(config: ConfigDict) -> str:
    """The way to make class sets that the config's specialists are not made by."""
    return {"kmeans": "greedy", "greedy": "kmeans"}[config.clusters.method]


def _load_sets(context: Context, seed: int, method: str) -> np.ndarray:
    path = context.inputs["clusters"] / f"seed_{context.config.seeds[seed]}.npz"
    return np.load(path)[method]


def _batches(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _BATCH):
        yield array[start : start + _BATCH]


def _size(config: ConfigDict, num_classes: int) -> int:
    if config.clusters.partition:
        return -(-num_classes // config.clusters.count)
    if not 0 < config.clusters.size < num_classes:
        raise UserError(
            f"clusters.size is {config.clusters.size}; it must be above 0 and below the {num_classes} "
            "classes, for a dustbin to be left"
        )
    return config.clusters.size


def _class_sets(
    config: ConfigDict, points: jax.Array, centroids: jax.Array, num_classes: int
) -> np.ndarray:
    if not config.clusters.partition:
        size = _size(config, num_classes)
        return np.asarray(clustering.class_sets(points, centroids, size), np.int32)
    sets = clustering.pad_sets(clustering.partition(points, centroids), num_classes)
    coverage.check_disjoint(sets, num_classes)
    return np.asarray(sets, np.int32)


def _keep(
    path: Path,
    data: Data,
    matrix: jax.Array,
    clusters: tuple[jax.Array, jax.Array],
    sets: Mapping[str, np.ndarray],
) -> None:
    """What the other stages and the report need of a seed's clusters: their points and centroids."""
    points, centroids = clusters
    distances = jnp.sum(jnp.square(points[:, None] - centroids[None]), axis=-1)
    central = np.asarray(jnp.argsort(distances, axis=0)[: sets["kmeans"].shape[1]].T, np.int32)
    names = [[data.class_names[c] for c in row[:_NAMED]] for row in central]
    write_json(path.with_suffix(".json"), names)
    write_arrays(
        path,
        **sets,
        central=central,
        matrix=np.asarray(matrix, np.float32),
        assignment=np.asarray(jnp.argmin(distances, axis=1), np.int32),
        class_images=data.class_images,
    )
