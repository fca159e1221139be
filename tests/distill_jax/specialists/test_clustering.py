"""Clustering the classes: against float64 NumPy, scikit-learn and confusions planted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from distill_jax.errors import UserError
from distill_jax.specialists import clustering, coverage

seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=20)


def softmax64(logits, temperature=1.0):
    z = np.asarray(logits, np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def draw_logits(seed, size=100, num_classes=7, scale=3.0):
    random = np.random.default_rng(seed)
    return scale * random.standard_normal((size, num_classes)).astype(np.float32)


def cut(size, array):
    """Batches of `size`, the last one smaller."""
    return [array[i : i + size] for i in range(0, len(array), size)]


def cut_both(size, labels, logits):
    return zip(cut(size, labels), cut(size, logits), strict=True)


def assert_close_to_largest(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def blobs(seed, spread, centres=8, size=600):
    points, labels = make_blobs(
        size, n_features=10, centers=centres, cluster_std=spread, random_state=seed
    )
    return jnp.asarray(points, jnp.float32), labels


def distances64(points, centroids):
    points, centroids = np.asarray(points, np.float64), np.asarray(centroids, np.float64)
    return np.square(centroids[:, None] - points[None]).sum(-1)


def inertia(points, centroids):
    return distances64(points, centroids).min(0).sum()


def planted(seed, groups=6, per_group=5, size=3000):
    """A generalist that takes a class for others of its group only: labels, logits, groups `[C]`."""
    random = np.random.default_rng(seed)
    num_classes = groups * per_group
    group = random.permutation(np.repeat(np.arange(groups), per_group))
    labels = random.integers(0, num_classes, size)
    logits = random.standard_normal((size, num_classes))
    logits += 4.0 * (group[labels][:, None] == group)
    return labels, logits.astype(np.float32), group


@few
@given(seeds, st.sampled_from([1, 8, 30, 100]), st.floats(0.5, 5, width=32))
def test_covariance_is_numpys(seed, batch_size, temperature):
    logits = draw_logits(seed)
    found = clustering.prediction_covariance(iter(cut(batch_size, logits)), temperature)
    assert found.shape == (7, 7) and found.dtype == jnp.float32
    expected = np.cov(softmax64(logits, temperature), rowvar=False, ddof=0)
    assert_close_to_largest(found, expected, 1e-6)


def test_covariance_of_many_small_batches_adds_up():
    logits = draw_logits(1, size=12_000, num_classes=5)
    found = clustering.prediction_covariance(cut(4, logits))
    assert_close_to_largest(found, np.cov(softmax64(logits), rowvar=False, ddof=0), 1e-6)


def test_covariance_of_nearly_constant_predictions_survives_float32():
    logits = draw_logits(2, size=2000, scale=1e-3) + np.arange(7, dtype=np.float32)
    found = clustering.prediction_covariance(cut(64, logits))
    # The deviations, about 2e-4, are of probabilities up to 0.6 which are rounded to 3e-8. Sums of
    # squares less the square of the sum would leave nothing: 0.6^2 is rounded to half of 2e-4^2.
    assert_close_to_largest(found, np.cov(softmax64(logits), rowvar=False, ddof=0), 5e-5)


@few
@given(seeds)
def test_covariance_of_permuted_classes_is_permuted(seed):
    logits = draw_logits(seed)
    order = np.random.default_rng(seed).permutation(7)
    plain = clustering.prediction_covariance(cut(30, logits))
    permuted = clustering.prediction_covariance(cut(30, logits[:, order]))
    assert_close_to_largest(permuted, np.asarray(plain)[order][:, order], 1e-6)


@few
@given(seeds, st.sampled_from([8, 30, 100]))
def test_confusion_is_the_mean_prediction_of_each_class(seed, batch_size):
    logits = draw_logits(seed)
    labels = np.random.default_rng(seed).integers(0, 6, 100)  # class 6 has no example
    found = clustering.confusion(cut_both(batch_size, labels, logits), 2.0)
    p = softmax64(logits, 2.0)
    rates = np.stack(
        [p[labels == c].mean(0) if (labels == c).any() else 0 * p[0] for c in range(7)]
    )
    np.testing.assert_allclose(found, (rates + rates.T) / 2, atol=1e-6)


def test_confusion_of_hard_decisions_counts_them():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 0, 1, 1, 2, 2])
    logits = np.eye(3, dtype=np.float32)[predicted]
    found = clustering.confusion(cut_both(3, labels, logits), temperature=1e-3)
    expected = [[0.75, 0.125, 0.0], [0.125, 0.5, 0.25], [0.0, 0.25, 1.0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    more = [np.concatenate([x, x[:4], x[:4]]) for x in (labels, logits)]  # class 0 thrice as often
    np.testing.assert_allclose(clustering.confusion(cut_both(5, *more), 1e-3), expected, atol=1e-6)


def test_streams_name_what_is_wrong():
    logits = draw_logits(0)
    with pytest.raises(UserError, match="at least one batch"):
        clustering.prediction_covariance([])
    with pytest.raises(UserError, match=r"\(7,\); expected \[B, C\]"):
        clustering.prediction_covariance([logits[0]])
    with pytest.raises(UserError, match=r"\(100, 6\); expected \[B, 7\]"):
        clustering.prediction_covariance([logits, logits[:, :6]])
    with pytest.raises(UserError, match="not finite"):
        clustering.prediction_covariance([logits, np.where(logits > 0, np.nan, logits)])
    with pytest.raises(UserError, match="at least one batch"):
        clustering.confusion([])
    with pytest.raises(UserError, match=r"in 0\.\.6; they are 0 to 7"):
        clustering.confusion([(np.arange(8), logits[:8])])
    with pytest.raises(UserError, match=r"in 0\.\.6; they are -1 to 6"):
        clustering.confusion([(np.arange(8) - 1, logits[:8])])
    with pytest.raises(UserError, match=r"labels is int64 \(8,\); expected int 100"):
        clustering.confusion([(np.arange(8), logits)])


def test_columns_are_columns_of_unit_length():
    matrix = np.random.default_rng(0).standard_normal((5, 5)).astype(np.float32)
    matrix[:, 3] = 0.0
    unit = np.asarray(clustering.columns(jnp.asarray(matrix)))
    lengths = np.linalg.norm(matrix, axis=0)
    np.testing.assert_allclose(unit * lengths[:, None], matrix.T, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), lengths > 0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_k_means_reaches_scikit_learns_inertia(seed, key):
    points, _ = blobs(seed, spread=2.0)
    reference = KMeans(8, n_init=10, random_state=0).fit(points)
    centroids = clustering.online_k_means(points, 8, key)
    assert inertia(points, centroids) < 1.05 * reference.inertia_


@pytest.mark.parametrize("seed", range(4))
def test_k_means_parts_separated_blobs_as_scikit_learn_does(seed, key):
    points, labels = blobs(seed, spread=0.5)
    reference = KMeans(8, n_init=10, random_state=0).fit(points)
    sets = clustering.partition(points, clustering.online_k_means(points, 8, key))
    found = np.empty(len(points), int)
    for m, rows in enumerate(sets):
        found[rows] = m
    assert adjusted_rand_score(reference.labels_, found) == 1
    assert adjusted_rand_score(labels, found) == 1


def test_k_means_of_overlapping_blobs_converges_as_well_as_scikit_learn():
    points, _ = blobs(3, spread=4.0)

    def mean_inertia(**options):
        keys = [jax.random.key(i) for i in range(20)]
        found = [clustering.online_k_means(points, 8, key, **options) for key in keys]
        return np.mean([inertia(points, centroids) for centroids in found])

    theirs = [KMeans(8, n_init=1, random_state=i).fit(points).inertia_ for i in range(20)]
    assert mean_inertia() < 1.05 * np.mean(theirs)
    assert mean_inertia() < mean_inertia(memory=1e9)  # why old points are forgotten


def test_k_means_is_a_function_of_its_key(key):
    points, _ = blobs(0, spread=4.0)
    first = clustering.online_k_means(points, 8, key)
    np.testing.assert_array_equal(first, clustering.online_k_means(points, 8, key))
    inside = jax.jit(functools.partial(clustering.online_k_means, k=8))(points, key=key)
    np.testing.assert_array_equal(first, inside)
    assert not np.array_equal(first, clustering.online_k_means(points, 8, jax.random.key(1)))


def test_a_centroid_is_a_mean_that_remembers_a_limited_number_of_points(key):
    points, _ = blobs(0, spread=1.0, size=50)
    rows = np.asarray(points, np.float64)
    one = functools.partial(clustering.online_k_means, points, 1, key, memory=20)
    seed, first, second = (np.asarray(one(epochs=n)[0], np.float64) for n in range(3))
    assert (rows == seed).all(1).any()
    np.testing.assert_allclose(first, (seed + rows.sum(0)) / 51, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second, (20 * first + rows.sum(0)) / 70, rtol=1e-5, atol=1e-5)


def test_k_means_seeds_are_distinct_points(key):
    points = jnp.asarray(np.repeat(np.eye(6, dtype=np.float32), 10, axis=0))
    centroids = clustering.online_k_means(points, 6, key)
    np.testing.assert_allclose(np.sort(centroids, axis=0)[-1], np.ones(6), atol=1e-6)
    for k in (0, 61):
        with pytest.raises(UserError, match=f"1 to 60 clusters for 60 points, not {k}"):
            clustering.online_k_means(points, k, key)


@few
@given(seeds)
def test_class_sets_are_the_nearest_whatever_the_order_of_classes(seed):
    random = np.random.default_rng(seed)
    points, centroids = random.standard_normal((2, 30, 30)).astype(np.float32)
    centroids = centroids[:4]
    sets = np.asarray(clustering.class_sets(jnp.asarray(points), jnp.asarray(centroids), 9))
    assert sets.dtype == np.int32
    expected = np.sort(np.argsort(distances64(points, centroids))[:, :9])
    np.testing.assert_array_equal(sets, expected)
    order = random.permutation(30)
    permuted = clustering.class_sets(
        jnp.asarray(points[order][:, order]), jnp.asarray(centroids[:, order]), 9
    )
    np.testing.assert_array_equal(np.sort(order[permuted]), sets)


@few
@given(seeds)
def test_a_partition_holds_every_class_once(seed):
    random = np.random.default_rng(seed)
    points = random.standard_normal((30, 30)).astype(np.float32)
    centroids = points[random.choice(30, 4, replace=False)]  # each is nearest to itself at least
    sets = clustering.partition(jnp.asarray(points), jnp.asarray(centroids))
    assert all(s.dtype == np.int32 and (np.diff(s) > 0).all() for s in sets)
    np.testing.assert_array_equal(np.sort(np.concatenate(sets)), np.arange(30))
    nearest = distances64(points, centroids).argmin(0)
    assert all((nearest[s] == m).all() for m, s in enumerate(sets))
    padded = clustering.pad_sets(sets, 30)
    assert padded.dtype == np.int32 and padded.shape == (4, max(map(len, sets)))
    coverage.check_disjoint(padded, 30)
    np.testing.assert_array_equal(coverage.sets_per_class(padded, 30), 1)


def test_an_empty_cluster_is_named():
    points = jnp.eye(5)
    centroids = jnp.stack([points[0], jnp.full(5, 100.0), points[1]])
    with pytest.raises(UserError, match=r"cluster 1 of 3 has no class \(1 have none\)"):
        clustering.partition(points, centroids)


def test_sets_that_share_a_class_are_named():
    sets = np.array([[0, 1, 9], [2, 3, 4], [4, 5, 9]])  # 9 is padding
    with pytest.raises(UserError, match="sets 1 and 2 share class 4"):
        coverage.check_disjoint(sets, 9)
    coverage.check_disjoint(sets[:2], 9)


def test_set_sizes_are_checked(key):
    for size in (0, 6):
        with pytest.raises(UserError, match=f"1 to 5 classes, not {size}"):
            clustering.class_sets(jnp.eye(5), jnp.eye(5), size)
        with pytest.raises(UserError, match=f"1 to 5 classes, not {size}"):
            clustering.random_sets(5, 2, size, key)


@pytest.mark.parametrize("seed", range(3))
def test_planted_confusions_are_found(seed, key):
    labels, logits, group = planted(seed)
    expected = {frozenset(np.flatnonzero(group == g)) for g in range(6)}
    covariance = clustering.prediction_covariance(cut(256, logits), temperature=2.0)
    for matrix in (
        covariance,
        clustering.confusion(cut_both(256, labels, logits), temperature=2.0),
    ):
        points = clustering.columns(matrix)
        centroids = clustering.online_k_means(points, 6, key)
        assert {frozenset(s) for s in clustering.partition(points, centroids)} == expected
        sets = np.asarray(clustering.class_sets(points, centroids, 5))
        assert {frozenset(s) for s in sets} == expected


def test_planted_sets_cover_more_mistakes_than_random_ones(key):
    labels, logits, group = planted(0)
    sets = np.stack([np.flatnonzero(group == g) for g in range(6)])
    predictions = logits.argmax(1)
    by_group = coverage.mistakes_covered(sets, 30, labels, predictions)
    wrong = labels != predictions
    assert by_group == (group[labels] == group[predictions])[wrong].mean() > 0.8
    by_chance = coverage.mistakes_covered(
        clustering.random_sets(30, 6, 5, key), 30, labels, predictions
    )
    assert by_chance < 0.5


def test_coverage_by_hand():
    sets = np.array([[0, 1, 2], [2, 3, 6], [2, 0, 6]])  # 6 is padding
    found = coverage.sets_per_class(sets, 6)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [2, 1, 3, 1, 0, 0])
    statistics = coverage.statistics(sets, 6)
    assert statistics == {"covered": 4 / 6, "mean_cover": 7 / 4, "max_cover": 3.0}
    labels, predictions = np.array([0, 0, 3, 5, 4, 1]), np.array([0, 1, 2, 4, 4, 3])
    # Mistakes: 0-1 in the first set, 3-2 in the second, 5-4 in none, 1-3 in two different ones.
    assert coverage.mistakes_covered(sets, 6, labels, predictions) == 0.5
    assert coverage.mistakes_covered(sets, 6, labels, labels) == 1.0


def test_random_sets_are_uniform(key):
    sets = np.asarray(clustering.random_sets(20, 500, 6, key))
    assert sets.shape == (500, 6) and sets.dtype == np.int32
    assert (np.diff(sets, axis=1) > 0).all()
    counts = coverage.sets_per_class(sets, 20)
    assert counts.sum() == 3000
    # Within a set classes exclude each other, so the counts vary less than the test supposes.
    assert chisquare(counts).pvalue > 1e-3
    np.testing.assert_array_equal(sets, clustering.random_sets(20, 500, 6, key))
