"""The benchmark of compressed soft targets: its teacher, its draws, its judgement, and that it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import benchmark

from distill_jax import losses
from experiments.benchmarks import soft_target_storage


def test_the_teacher_is_sure_of_some_examples_and_not_of_others():
    teacher = soft_target_storage.make_teacher(14_000)
    inputs = jnp.asarray(soft_target_storage.draw_inputs(500, 0))
    first = np.max(losses.softmax(teacher(inputs)), axis=-1)
    assert np.quantile(first, 0.1) < 0.2 and np.quantile(first, 0.9) > 0.85
    again = soft_target_storage.make_teacher(14_000)(inputs[:2])
    np.testing.assert_allclose(again, teacher(inputs)[:2], atol=1e-4)


def test_independent_draws_have_the_probabilities_as_shares():
    probabilities = jnp.asarray([[0.5, 0.0, 0.3, 0.2], [0.0, 0.0, 0.0, 1.0]])
    ids = soft_target_storage.draw_independently(probabilities, 20_000, jax.random.key(0))
    shares = np.stack([np.bincount(row, minlength=4) for row in ids]) / 20_000
    np.testing.assert_allclose(shares, probabilities, atol=0.015)  # four standard deviations
    assert shares[0, 1] == 0 and shares[1, 3] == 1


def test_a_net_is_judged_by_what_the_teacher_gives_its_first_choice():
    expected = jnp.asarray([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    inputs = np.eye(2, 3, dtype=np.float32)

    def rightly(x):
        return x

    def wrongly(x):
        return -x[:, ::-1]

    found = soft_target_storage.judge([rightly, wrongly], inputs, expected)
    np.testing.assert_allclose(found, [65.0, 40.0], rtol=1e-6)


@pytest.fixture(scope="module")
def result():
    sizes = {
        "classes": 300,
        "k": 4,
        "transfer_set": 256,
        "tested": 64,
        "compared": 256,
        "epochs": 1,
    }
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    return benchmark("soft_target_storage", *flags, "--seeds=2", "--temperatures=2")


def test_it_ends_with_its_result(result):
    assert result["benchmark"] == "soft_target_storage"
    assert result["device"] in ("cpu", "gpu")
    names = ("dense", "top_k", "sampled", "independent", "teacher")
    assert set(result["figures"]) == {f"T=2 {name}" for name in names}
    figures = {name: result["figures"][f"T=2 {name}"] for name in names}
    # As stored, with a digest of 8 bytes: 4 of a kept class and 4 of the tail, 2 of a drawn one.
    assert [figures[name]["bytes"] for name in ("dense", "top_k", "sampled")] == [1208, 28, 28]
    for name in ("dense", "top_k", "sampled"):
        assert 0 <= figures[name]["accuracy"] <= figures["teacher"]["accuracy"] < 100
        less = figures[name]["accuracy"] - figures["dense"]["accuracy"]
        assert figures[name]["less_dense"] == pytest.approx(less)


def test_the_gradient_of_the_largest_is_biased_and_that_of_systematic_draws_least_noisy(result):
    names = ("top_k", "sampled", "independent")
    top_k, sampled, _ = (result["figures"][f"T=2 {name}"] for name in names)
    noise = {name: result["figures"][f"T=2 {name}"]["gradient_noise"] for name in names}
    ratio = result["ratios"]["T=2 gradient_variance independent/sampled"]
    assert 0 == noise["top_k"] < noise["sampled"] < noise["independent"]
    assert ratio == pytest.approx((noise["independent"] / noise["sampled"]) ** 2)
    assert sampled["gradient_bias"] < 0.5 * top_k["gradient_bias"]
    assert "kl" in top_k and "kl" not in sampled  # where it is infinite
