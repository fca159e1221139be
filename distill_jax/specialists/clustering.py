"""The class set of each specialist: section 5.3 of the paper, and the confusion matrix of section 7.

Classes that the generalist often predicts together form a cluster: on-line K-means on the columns of
the covariance matrix of its predictions, which needs no labels. The set of a specialist is either the
classes nearest to a centroid (sets of equal size, which may overlap: the paper's 61 sets of 300) or a
whole cluster (a partition). Or sets grow greedily from pairs of classes that are confused
(`greedy`).

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

from distill_jax import losses, ranges, shapes
from distill_jax.errors import UserError


def prediction_covariance(batches: Iterable[ArrayLike], temperature: float = 1.0) -> Array:
    """The covariance of a generalist's predictions over a data set, in one pass without labels.

    Batches are merged by their means (Chan, Golub, LeVeque 1983), which avoids differences of large
    sums. The rounding errors of the float32 sums are compensated (Kahan 1965).

    Args:
        batches: logits `[B, C]`; B may differ between batches.
        temperature: of the predictions, scalar above 0; a higher one gives more weight to the second
            and third class.

    Returns:
        float32 `[C, C]`, divided by N (`np.cov` with ddof=0).

    Raises:
        UserError: for no batch at all, another shape, or logits that are not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax.specialists import clustering
        >>> batches = [jnp.array([[0.0, 0.0], [50.0, 0.0]]), jnp.array([[0.0, 50.0]])]
        >>> print(clustering.prediction_covariance(batches))
        [[ 0.167 -0.167]
         [-0.167  0.167]]
    """
    ranges.check(temperature=temperature)
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
    """How often the generalist confuses two classes: the matrix that section 7 clusters.

    Row c is the mean prediction for the examples of class c, so that a frequent class weighs no more
    than a rare one. The result is the mean of this matrix and its transpose, since the direction of a
    confusion does not matter. Its columns are clustered like those of a covariance matrix.

    Args:
        batches: labels int `[B]` and logits `[B, C]`.
        temperature: of the predictions, scalar above 0; near 0 they become hard decisions.

    Returns:
        float32 `[C, C]`, symmetric. The row of a class without examples counts as 0.

    Raises:
        UserError: for no batch at all, another shape, labels outside 0..C-1, or logits that are not
            finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax.specialists import clustering
        >>> batches = [(jnp.array([0, 1]), jnp.array([[0.0, 0.0], [0.0, 50.0]]))]
        >>> print(clustering.confusion(batches))
        [[0.5  0.25]
         [0.25 1.  ]]
    """
    ranges.check(temperature=temperature)
    counts = None
    for labels, batch in batches:
        logits = _checked(batch, None if counts is None else len(counts))
        num_classes, labels = logits.shape[1], np.asarray(labels)
        shapes.check(labels=(labels, f"int {len(logits)}"))
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


def columns(matrix: Array) -> Array:
    """The points to cluster, one per class: the columns of a covariance or confusion matrix.

    They have unit length, so that classes are compared by what they are confused with and not by how
    often they are predicted; otherwise a few frequent classes take all centroids.

    Args:
        matrix: float32 `[C, C]`.

    Returns:
        float32 `[C, C]`, a row per class; a column of zeros stays 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax.specialists import clustering
        >>> print(clustering.columns(jnp.array([[3.0, 0.0], [4.0, 2.0]])))
        [[0.6 0.8]
         [0.  1. ]]
    """
    shapes.check(matrix=(matrix, "float C C"))
    points = matrix.astype(jnp.float32).T
    length = jnp.linalg.norm(points, axis=1, keepdims=True)
    return points / jnp.where(length > 0, length, 1.0)


def online_k_means(
    points: Array, k: int, key: Array, epochs: int = 15, memory: ArrayLike = 20.0
) -> Array:
    """On-line K-means (MacQueen 1967): every point moves the centroid nearest to it by 1/count.

    The first centroids are drawn by greedy k-means++ (Arthur, Vassilvitskii 2007). A centroid is the
    mean of the points that it has counted; those of earlier epochs count as at most `memory` points.
    Without this limit the early points, from when the centroid was elsewhere, would keep their weight,
    and it would hardly move after the first epoch. Within an epoch the steps still shrink, so it
    converges.

    Args:
        points: `[N, D]`.
        k: number of centroids; static.
        key: of the first centroids and of the orders; the same key gives the same centroids.
        epochs: passes over the points, each in a new order; static.
        memory: the largest count with which a centroid starts an epoch.

    Returns:
        float32 `[k, D]`.

    Raises:
        UserError: if k is not in 1..N.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from distill_jax.specialists import clustering
        >>> points = jnp.array([[0.0], [0.2], [9.0], [9.2]])
        >>> print(jnp.sort(clustering.online_k_means(points, 2, jax.random.key(0)), axis=0))
        [[0.103]
         [9.097]]
    """
    size = shapes.check(points=(points, "float N D"))["N"]
    if not 1 <= k <= size:
        raise UserError(f"K-means needs 1 to {size} clusters for {size} points, not {k}")
    return _online_k_means(points, k, key, epochs, memory)


@functools.partial(jax.jit, static_argnames=("k", "epochs"))
def _online_k_means(points: Array, k: int, key: Array, epochs: int, memory: ArrayLike) -> Array:
    size, points = len(points), points.astype(jnp.float32)
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
        >>> from distill_jax.specialists import clustering
        >>> points, centroids = jnp.array([[0.0], [2.0], [9.0]]), jnp.array([[0.5], [8.0]])
        >>> print(clustering.class_sets(points, centroids, size=2))
        [[0 1]
         [1 2]]
    """
    shapes.check(points=(points, "float C D"), centroids=(centroids, "float K D"))
    if not 1 <= size <= len(points):
        raise UserError(f"a class set has 1 to {len(points)} classes, not {size}")
    _, nearest = jax.lax.top_k(-_all_distances(points, centroids), size)
    return jnp.sort(nearest.astype(jnp.int32), axis=1)


def partition(points: Array, centroids: Array) -> list[np.ndarray]:
    """Assigns every class to its nearest centroid, so that each class is in exactly one set.

    Args:
        points: `[C, D]`.
        centroids: `[K, D]`.

    Returns:
        K arrays int32, each sorted; `pad_sets` makes one array of them.

    Raises:
        UserError: if a centroid gets no class; the message names it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax.specialists import clustering
        >>> points, centroids = jnp.array([[0.0], [2.0], [9.0]]), jnp.array([[0.5], [8.0]])
        >>> [classes.tolist() for classes in clustering.partition(points, centroids)]
        [[0, 1], [2]]
    """
    shapes.check(points=(points, "float C D"), centroids=(centroids, "float K D"))
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
    """Sets of unequal sizes as one array int32 `[K, S]`; smaller sets are padded at the end.

    Args:
        sets: K sorted arrays of classes.
        padding: C.

    Examples:
        >>> import numpy as np
        >>> from distill_jax.specialists import clustering
        >>> print(clustering.pad_sets([np.array([0, 1]), np.array([2])], padding=3))
        [[0 1]
         [2 3]]
    """
    size = max(len(classes) for classes in sets)
    padded = np.full((len(sets), size), padding, np.int32)
    for row, classes in zip(padded, sets, strict=True):
        row[: len(classes)] = classes
    return padded


def random_sets(num_classes: int, k: int, size: int, key: Array) -> Array:
    """Random class sets, as a control: int32 `[k, size]`, each row sorted.

    Raises:
        UserError: if the size is not in 1..C.

    Examples:
        >>> import jax
        >>> from distill_jax.specialists import clustering
        >>> clustering.random_sets(num_classes=10, k=3, size=4, key=jax.random.key(0)).shape
        (3, 4)
    """
    if not 1 <= size <= num_classes:
        raise UserError(f"a class set has 1 to {num_classes} classes, not {size}")
    orders = jax.vmap(lambda key: jax.random.permutation(key, num_classes))(
        jax.random.split(key, k)
    )
    return jnp.sort(orders[:, :size].astype(jnp.int32), axis=1)


class _Moments(NamedTuple):
    """Of the examples so far: mean `[C]`, scatter about it `[C, C]`, and its rounding error."""

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
    """Checks that a batch is logits `[B, C]` with the same C as earlier batches."""
    logits = np.asarray(batch) if isinstance(batch, list) else batch
    shapes.check(logits=(logits, "float *"))
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or not logits.size or num_classes not in (None, logits.shape[1]):
        expected = "[B, C]" if num_classes is None else f"[B, {num_classes}]"
        raise UserError(f"a batch of logits has the shape {logits.shape}; expected {expected}")
    return logits


def _finite(matrix: Array) -> Array:
    if not jnp.isfinite(matrix).all():
        raise UserError("the generalist's logits are not finite, so its classes can't be clustered")
    return matrix


def _seeds(points: Array, k: int, key: Array) -> Array:
    """k-means++: points are drawn in proportion to the squared distance to the nearest earlier seed.

    Each time a few points are drawn, and the one that lowers the sum of these distances most is kept. A
    single draw sometimes puts two seeds in one cluster, which on-line steps do not undo.
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
    """`[N, D]`, `[D]` -> `[N]`; from differences, since the expanded square cancels in float32."""
    return jnp.sum(jnp.square(points - point[None]), axis=-1)


@jax.jit
def _all_distances(points: Array, centroids: Array) -> Array:
    """`[N, D]`, `[K, D]` -> `[K, N]`, one centroid at a time."""
    points, centroids = points.astype(jnp.float32), centroids.astype(jnp.float32)
    return jax.lax.map(lambda centroid: _squared_distances(points, centroid), centroids)
