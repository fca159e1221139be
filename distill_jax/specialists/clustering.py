"""Which classes each specialist gets: section 5.3 of the paper, and section 7's confusion matrix.

Classes that the generalist predicts together are put together: on-line K-means on the columns of the
covariance of its predictions, which needs no labels. A specialist takes the classes nearest to a
centroid (sets of one size, which may overlap: the paper's 61 sets of 300) or a cluster (a partition).

Class sets are int32 `[K, S]`, each row sorted; a smaller set is padded with C, which is no class.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import losses
from distill_jax.errors import UserError


def prediction_covariance(batches: Iterable[ArrayLike], temperature: float = 1.0) -> Array:
    """The covariance of a generalist's predictions over a data set, in one pass without labels.

    Batches are merged by their means (Chan, Golub, LeVeque 1983), so nothing is lost to subtracting
    large sums, and what float32 drops in adding them up is carried along (Kahan 1965).

    Args:
        batches: logits `[B, C]`, each of any B.
        temperature: of the predictions, scalar above 0; a higher one shows more of the classes that
            come second and third.

    Returns:
        float32 `[C, C]`, divided by N (`np.cov` with ddof=0).

    Raises:
        UserError: for no batch at all, another shape, or logits that are not finite.

    Examples:
        >>> import numpy as np
        >>> logits = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
        >>> prediction_covariance([logits[:60], logits[60:]], temperature=2.0).shape
        (5, 5)
    """
    count, moments = 0, None
    for batch in batches:
        logits = _checked(batch, None if moments is None else len(moments.mean))
        if moments is None:
            moments = _Moments(*(jnp.zeros((logits.shape[1],) * rank) for rank in (1, 2, 2)))
        size = len(logits)
        count += size
        share = size / count
        moments = _merge(moments, logits, temperature, share, (count - size) * share)
    if moments is None:
        raise UserError("the covariance of predictions needs at least one batch of logits [B, C]")
    return _finite(moments.scatter / count)


def confusion(batches: Iterable[tuple[ArrayLike, ArrayLike]], temperature: float = 1.0) -> Array:
    """How often the generalist confuses one class with another: what section 7 clusters by.

    Row c is the mean prediction for the examples of class c, so a frequent class weighs no more than a
    rare one. The result is the mean of that matrix and its transpose: which of two classes is predicted
    for the other doesn't matter. Its columns are clustered like a covariance's.

    Args:
        batches: labels int `[B]` and logits `[B, C]`.
        temperature: of the predictions, scalar above 0; near 0 they become hard decisions.

    Returns:
        float32 `[C, C]`, symmetric. A class without examples adds nothing of its own.

    Raises:
        UserError: for no batch at all, another shape, labels outside 0..C-1, or logits that are not
            finite.

    Examples:
        >>> import numpy as np
        >>> logits = np.array([[9.0, 0.0], [0.0, 0.0]], np.float32)
        >>> confusion([(np.array([0, 1]), logits)]).round(2).tolist()
        [[1.0, 0.25], [0.25, 0.5]]
    """
    counts = None
    for labels, batch in batches:
        logits = _checked(batch, None if counts is None else len(counts))
        num_classes, labels = logits.shape[1], np.asarray(labels, np.int32)
        if labels.shape != (len(logits),):
            raise UserError(f"labels {labels.shape} for logits {logits.shape}; expected [B]")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(
                f"labels for a confusion matrix must be in 0..{num_classes - 1}; they are "
                f"{labels.min()} to {labels.max()}"
            )
        if counts is None:
            counts = jnp.zeros((num_classes, num_classes))
        counts = _count(counts, labels, logits, temperature)
    if counts is None:
        raise UserError("a confusion matrix needs at least one batch of labels and logits")
    examples = jnp.sum(counts, axis=1, keepdims=True)
    rates = counts / jnp.where(examples > 0, examples, 1.0)
    return _finite((rates + rates.T) / 2)


def columns(matrix: Array, normalise: bool = True) -> Array:
    """The points to cluster, one per class: the columns of a `[C, C]` covariance or confusion.

    Args:
        matrix: float32 `[C, C]`.
        normalise: to unit length, so that classes are compared by what they are confused with and not
            by how often they are predicted; else a few frequent classes take all centroids.

    Returns:
        float32 `[C, C]`, a row per class; a column of 0 stays so.

    Examples:
        >>> import jax.numpy as jnp
        >>> columns(jnp.array([[2.0, 0.0], [0.0, 0.0]])).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    points = matrix.astype(jnp.float32).T
    if not normalise:
        return points
    length = jnp.linalg.norm(points, axis=1, keepdims=True)
    return points / jnp.where(length > 0, length, 1.0)


@functools.partial(jax.jit, static_argnames=("k", "epochs"))
def online_k_means(
    points: Array, k: int, key: Array, epochs: int = 15, memory: ArrayLike = 20.0
) -> Array:
    """On-line K-means (MacQueen 1967): every point moves the centroid nearest to it by 1/count.

    The seeds are drawn by greedy k-means++ (Arthur, Vassilvitskii 2007). A centroid is the mean of the
    points that it has counted; those of earlier epochs count as `memory` points at most. Otherwise the
    points that moved it when it was elsewhere would weigh as much as those near it now, and it would
    hardly move after the first epoch. Within an epoch the steps still shrink, so it converges.

    Args:
        points: `[N, D]`.
        k: centroids; static.
        key: the seeds' and the orders'; the same key gives the same centroids.
        epochs: passes over the points, each in a new order; static.
        memory: the count, at most, that a centroid starts an epoch with.

    Returns:
        float32 `[k, D]`.

    Raises:
        UserError: if k is not in 1..N.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> points = jnp.array([[0.0], [0.0], [8.0], [8.0]])
        >>> sorted(online_k_means(points, 2, jax.random.key(0)).ravel().tolist())
        [0.0, 8.0]
    """
    size = len(points)
    if not 1 <= k <= size:
        raise UserError(f"K-means needs 1 to {size} clusters for {size} points, not {k}")
    points = points.astype(jnp.float32)
    seed_key, order_key = jax.random.split(key)

    def move(state: tuple[Array, Array], row: Array):
        centroids, counts = state
        nearest = jnp.argmin(_squared_distances(centroids, points[row]))
        counts = counts.at[nearest].add(1.0)
        step = (points[row] - centroids[nearest]) / counts[nearest]
        return (centroids.at[nearest].add(step), counts), None

    def epoch(state: tuple[Array, Array], key: Array):
        centroids, counts = state
        state = centroids, jnp.minimum(counts, memory)
        return jax.lax.scan(move, state, jax.random.permutation(key, size))

    state = _seeds(points, k, seed_key), jnp.ones(k)
    (centroids, _), _ = jax.lax.scan(epoch, state, jax.random.split(order_key, epochs))
    return centroids


def class_sets(points: Array, centroids: Array, size: int) -> Array:
    """The `size` classes nearest to each centroid; a class may be in several sets, or in none.

    Args:
        points: `[C, D]`.
        centroids: `[K, D]`.
        size: S, in 1..C.

    Returns:
        int32 `[K, S]`, each row sorted.

    Raises:
        UserError: if the size is not in 1..C.

    Examples:
        >>> import jax.numpy as jnp
        >>> points, centroids = jnp.array([[0.0], [1.0], [7.0], [9.0]]), jnp.array([[0.0], [8.0]])
        >>> class_sets(points, centroids, 2).tolist()
        [[0, 1], [2, 3]]
    """
    if not 1 <= size <= len(points):
        raise UserError(f"a class set has 1 to {len(points)} classes, not {size}")
    _, nearest = jax.lax.top_k(-_all_distances(points, centroids), size)
    return jnp.sort(nearest.astype(jnp.int32), axis=1)


def partition(points: Array, centroids: Array) -> list[np.ndarray]:
    """Every class with the centroid nearest to it, so that each is in exactly one set.

    Args:
        points: `[C, D]`.
        centroids: `[K, D]`.

    Returns:
        K arrays int32, each sorted; `pad_sets` makes one array of them.

    Raises:
        UserError: naming a cluster that no class is nearest to.

    Examples:
        >>> import jax.numpy as jnp
        >>> points, centroids = jnp.array([[0.0], [1.0], [9.0]]), jnp.array([[0.0], [8.0]])
        >>> [classes.tolist() for classes in partition(points, centroids)]
        [[0, 1], [2]]
    """
    nearest = np.asarray(jnp.argmin(_all_distances(points, centroids), axis=0))
    sets = [np.flatnonzero(nearest == m).astype(np.int32) for m in range(len(centroids))]
    empty = [m for m, classes in enumerate(sets) if not len(classes)]
    if empty:
        raise UserError(
            f"cluster {empty[0]} of {len(sets)} has no class ({len(empty)} have none): a partition "
            "needs fewer clusters, or another key"
        )
    return sets


def pad_sets(sets: Sequence[np.ndarray], padding: int) -> np.ndarray:
    """Sets of unequal sizes as one int32 `[K, S]`, smaller ones padded at their end (with C).

    Examples:
        >>> import numpy as np
        >>> pad_sets([np.array([0, 4]), np.array([2])], padding=5).tolist()
        [[0, 4], [2, 5]]
    """
    size = max(len(classes) for classes in sets)
    padded = np.full((len(sets), size), padding, np.int32)
    for row, classes in zip(padded, sets, strict=True):
        row[: len(classes)] = classes
    return padded


def random_sets(num_classes: int, k: int, size: int, key: Array) -> Array:
    """The control: int32 `[k, size]`, each row sorted and drawn without regard to the predictions.

    Examples:
        >>> import jax
        >>> random_sets(10, k=3, size=4, key=jax.random.key(0)).shape
        (3, 4)
    """
    if not 1 <= size <= num_classes:
        raise UserError(f"a class set has 1 to {num_classes} classes, not {size}")
    orders = jax.vmap(lambda key: jax.random.permutation(key, num_classes))(
        jax.random.split(key, k)
    )
    return jnp.sort(orders[:, :size].astype(jnp.int32), axis=1)


def check_class_sets(class_sets: np.ndarray, num_classes: int) -> None:
    """Raises a UserError unless all classes are in 0..C, C being padding."""
    wrong = class_sets[(class_sets < 0) | (class_sets > num_classes)]
    if len(wrong):
        raise UserError(
            f"class_sets name class {wrong[0]}; there are {num_classes}, so expected 0 to "
            f"{num_classes - 1}, or {num_classes} for padding"
        )


def check_disjoint(sets: ArrayLike, num_classes: int) -> None:
    """Makes sure that no class is in two of the sets `[K, S]`.

    Raises:
        UserError: naming two sets and a class that they share.

    Examples:
        >>> check_disjoint([[0, 1], [2, 3]], num_classes=4)
    """
    members = _members(sets, num_classes)
    shared = np.flatnonzero(members.sum(axis=0) > 1)
    if len(shared):
        first, second, *_ = np.flatnonzero(members[:, shared[0]])
        raise UserError(
            f"sets {first} and {second} share class {shared[0]} ({len(shared)} classes are in more "
            "than one set): a partition puts every class in one set"
        )


def coverage(sets: ArrayLike, num_classes: int) -> np.ndarray:
    """How many of the sets `[K, S]` hold each class (the rows of Table 4): int32 `[C]`.

    Examples:
        >>> coverage([[0, 1], [1, 2]], num_classes=4).tolist()
        [1, 2, 1, 0]
    """
    return _members(sets, num_classes).sum(axis=0, dtype=np.int32)


def coverage_statistics(sets: ArrayLike, num_classes: int) -> dict[str, float]:
    """How many classes sets `[K, S]` cover, and how often.

    Returns:
        "covered": share of the classes that are in any set, 0..1; "mean_cover" and "max_cover": sets
        of a covered class.

    Examples:
        >>> coverage_statistics([[0, 1], [1, 2]], num_classes=6)
        {'covered': 0.5, 'mean_cover': 1.3333333333333333, 'max_cover': 2.0}
    """
    cover = coverage(sets, num_classes)
    covered = cover[cover > 0]
    return {
        "covered": len(covered) / num_classes,
        "mean_cover": float(covered.mean()),
        "max_cover": float(covered.max()),
    }


def mistakes_covered(
    sets: ArrayLike, num_classes: int, labels: ArrayLike, predictions: ArrayLike
) -> float:
    """The share of the generalist's mistakes that some specialist could correct.

    A specialist can correct a mistake only if both classes are in its set. So this is a bound on what a
    choice of sets can gain, known before any specialist is trained.

    Args:
        sets: int32 `[K, S]`.
        num_classes: C.
        labels: int `[N]`, in 0..C-1.
        predictions: int `[N]`, the generalist's most probable classes.

    Returns:
        The share whose true and predicted class are in one set, 0..1; 1 if there are no mistakes.

    Examples:
        >>> mistakes_covered([[0, 1], [2, 3]], 4, labels=[0, 0, 2, 3], predictions=[1, 2, 2, 3])
        0.5
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    wrong = labels != predictions
    if not wrong.any():
        return 1.0
    members = _members(sets, num_classes)
    together = members[:, labels[wrong]] & members[:, predictions[wrong]]
    return float(together.any(axis=0).mean())


class _Moments(NamedTuple):
    """Of the examples so far: mean `[C]`, scatter about it `[C, C]`, and the scatter's excess."""

    mean: Array
    scatter: Array
    excess: Array


@functools.partial(jax.jit, donate_argnums=0)
def _merge(
    moments: _Moments, logits: Array, temperature: ArrayLike, share: ArrayLike, weight: ArrayLike
) -> _Moments:
    """Adds a batch that is `share` of all n examples with it, `weight` = share * (n - B)."""
    p = losses.softmax(logits, temperature)
    mean = jnp.mean(p, axis=0)
    centred = p - mean[None]
    shift = mean - moments.mean
    scatter = jnp.matmul(centred.T, centred, precision="highest") + weight * jnp.outer(shift, shift)
    addend = scatter - moments.excess
    total = moments.scatter + addend
    return _Moments(moments.mean + share * shift, total, (total - moments.scatter) - addend)


@functools.partial(jax.jit, donate_argnums=0)
def _count(counts: Array, labels: Array, logits: Array, temperature: ArrayLike) -> Array:
    return counts.at[labels].add(losses.softmax(logits, temperature))


def _checked(batch: ArrayLike, num_classes: int | None) -> Array:
    """Logits `[B, C]` of as many classes as those before."""
    logits = jnp.asarray(batch)
    if logits.ndim != 2 or not logits.size or num_classes not in (None, logits.shape[1]):
        expected = "[B, C]" if num_classes is None else f"[B, {num_classes}]"
        raise UserError(f"a batch of logits has the shape {logits.shape}; expected {expected}")
    return logits


def _finite(matrix: Array) -> Array:
    if not jnp.isfinite(matrix).all():
        raise UserError("the generalist's logits are not finite, so its classes can't be clustered")
    return matrix


def _seeds(points: Array, k: int, key: Array) -> Array:
    """k-means++: points drawn by their squared distance to the nearest seed before.

    Of a few drawn each time, the one that lowers the sum of these distances most is kept: a single draw
    now and then puts two seeds in one cluster, which on-line steps don't undo.
    """
    trials = 2 + round(math.log(k))
    first_key, key = jax.random.split(key)
    first = points[jax.random.randint(first_key, (), 0, len(points))]

    def draw(distances: Array, key: Array):
        rows = jax.random.categorical(key, jnp.log(distances), shape=(trials,))
        lowered = jnp.minimum(distances[None], _all_distances(points, points[rows]))
        best = jnp.argmin(jnp.sum(lowered, axis=1))
        return lowered[best], points[rows[best]]

    _, others = jax.lax.scan(draw, _squared_distances(points, first), jax.random.split(key, k - 1))
    return jnp.concatenate([first[None], others])


def _squared_distances(points: Array, point: Array) -> Array:
    """`[N, D]`, `[D]` -> `[N]`; by differences, as the expanded square cancels in float32."""
    return jnp.sum(jnp.square(points - point[None]), axis=-1)


@jax.jit
def _all_distances(points: Array, centroids: Array) -> Array:
    """`[N, D]`, `[K, D]` -> `[K, N]`, one centroid at a time."""
    return jax.lax.map(lambda centroid: _squared_distances(points, centroid), centroids)


def _members(sets: ArrayLike, num_classes: int) -> np.ndarray:
    """Which set holds which class: bool `[K, C]`."""
    sets = np.asarray(sets)
    members = np.zeros((len(sets), num_classes + 1), bool)
    np.put_along_axis(members, sets, True, axis=1)
    return members[:, :num_classes]
