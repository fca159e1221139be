"""The benchmarks of very many classes run, and their last line is the result."""

import json
import math
import time

import numpy as np
import pytest
from command import fails, run

from distill_jax.errors import UserError
from experiments.benchmarks import acoustic_work, large_output_work, measure
from experiments.benchmarks.acoustic_work import Way
from experiments.benchmarks.large_output_work import Case, Gradients

CASE = Case("fused", "teacher", "6x4x64", "float32")


def result_of(benchmark, *arguments):
    output = run(*arguments, module=f"experiments.benchmarks.{benchmark}")
    return json.loads(output.splitlines()[-1])


def test_large_output_ends_with_its_result():
    result = result_of(
        "large_output", "--shapes=512x8x2000", "--targets=teacher", "--rounds=1", "--nopytorch"
    )
    assert result["benchmark"] == "large_output"
    ways = result["figures"]["512x8x2000 teacher"]
    assert set(ways) == {"dense", "fused"}
    for figures in ways.values():
        assert all(math.isfinite(n) and n > 0 for n in figures.values())
        # What the program takes beyond its arguments is what it is measured to take.
        taken = figures["temporary_bytes"] + figures["output_bytes"]
        assert figures.get("peak_bytes", taken) == pytest.approx(taken, rel=0.5)
    # A chunk is a quarter of the batch.
    ratios = result["ratios"]
    assert ratios["512x8x2000 teacher temporary fused/dense"] < 0.5
    assert ratios["512x8x2000 teacher time fused/dense"] > 0


def test_a_shape_that_is_none_is_named():
    message = fails("--shapes=8x8", module="experiments.benchmarks.large_output")
    assert "'8x8'" in message and "1024x512x14000" in message


@pytest.mark.parametrize("text", ["", "8", "8x8x63", "0x8x100", "8x8x100x2", "ax8x100", "-8x8x100"])
def test_shapes_that_are_none(text):
    with pytest.raises(UserError, match="--shapes"):
        large_output_work.parse_shape(text)


def test_the_work_is_distillation():
    work = large_output_work.draw(Case("fused", "stored", "20x3x130", "float32"))
    assert all(len(set(ids)) == 64 and ids.min() >= 0 and ids.max() < 130 for ids in work.ids)
    np.testing.assert_allclose(work.probabilities.sum(1) + work.tail, 1.0, rtol=1e-5)
    assert not large_output_work.draw(CASE._replace(targets="soft_only")).bias.any()


def test_operations_of_the_matrix_products():
    assert large_output_work.flops(CASE) == 4 * 2 * 6 * 4 * 64
    assert large_output_work.flops(CASE._replace(targets="stored")) == 3 * 2 * 6 * 4 * 64


def test_ways_that_compute_different_things_are_told_apart():
    work = large_output_work.draw(CASE)
    right = Gradients(1.0, work.hidden, work.kernel, work.bias)
    reference = large_output_work.summary(right, CASE)
    close = Gradients(1.0001, work.hidden, work.kernel, work.bias)
    large_output_work.check_agreement(CASE, large_output_work.summary(close, CASE), reference)
    without_bias = large_output_work.summary(right._replace(bias=None), CASE)
    large_output_work.check_agreement(CASE, without_bias, reference)
    for wrong in (
        right._replace(loss=1.01),
        right._replace(loss=math.nan),
        right._replace(hidden=-work.hidden),  # of the same length
        right._replace(kernel=1.01 * work.kernel),
        right._replace(bias=work.bias[::-1]),
    ):
        with pytest.raises(UserError, match="computes something else"):
            large_output_work.check_agreement(
                CASE, large_output_work.summary(wrong, CASE), reference
            )


def test_ratios_are_of_what_both_have():
    figures = {
        "8x8x100 teacher": {
            "dense": {"seconds": 2.0, "temporary_bytes": 10.0},
            "fused": {"seconds": 1.0, "temporary_bytes": 1.0},
            "fused_64": {"seconds": 9.0, "temporary_bytes": 9.0},
            "pytorch_eager": {"seconds": 4.0, "peak_bytes": 7.0},
        }
    }
    assert large_output_work.ratios(figures) == {
        "8x8x100 teacher temporary fused/dense": 0.1,
        "8x8x100 teacher time fused/dense": 0.5,
        "8x8x100 teacher time fused/pytorch_eager": 0.25,
    }


def test_memory_is_what_a_run_takes_at_most():
    def run():
        first = np.ones(2**23)  # 64 MiB
        del first
        np.ones(2**22)

    peak = measure.peak_resident(run)
    if peak is not None:
        assert 0.98 * 2**26 < peak < 1.2 * 2**26  # Linux counts in batches of pages


def test_seconds_are_of_one_run():
    assert 0.01 <= measure.seconds(lambda: time.sleep(0.01)) < 0.1


def test_acoustic_step_ends_with_its_result():
    result = result_of(
        "acoustic_step",
        "--hidden=8x2",
        "--targets=hard",
        "--targets=online_10",
        "--classes=100",
        "--batch_size=256",
        "--steps=1",
        "--rounds=1",
        "--matrix=64",
    )
    assert result["benchmark"] == "acoustic_step"
    parameters = 1041 * 8 + 9 * 8 + 9 * 100
    assert result["parameters"] == parameters
    ways = result["figures"]["batch 256"]
    assert set(ways) == {"hard", "online_10", "hard fused", "online_10 fused", "matrices"}
    rate = ways.pop("matrices")["flop_per_second"]
    for name, figures in ways.items():
        flops = (26 if "online_10" in name else 6) * parameters * 256
        assert figures["flop_per_second"] * figures["seconds"] == pytest.approx(flops)
        assert figures["utilisation"] == pytest.approx(figures["flop_per_second"] / rate)
    assert set(result["ratios"]) == {
        "batch 256 cost online_10/hard",
        "batch 256 cost online_10 fused/hard fused",
        "batch 256 time fused/dense hard",
        "batch 256 time fused/dense online_10",
        "batch 256 temporary fused/dense hard",
        "batch 256 temporary fused/dense online_10",
    }
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in result["ratios"].values())


def test_costs_are_beside_hard_targets():
    figures = {
        Way("hard", False): {"seconds": 2.0, "temporary_bytes": 4.0},
        Way("stored", False): {"seconds": 3.0, "temporary_bytes": 8.0},
        Way("hard", True): {"seconds": 1.0, "temporary_bytes": 1.0},
        Way("stored", True): {"seconds": 4.0, "temporary_bytes": 2.0},
    }
    assert acoustic_work.ratios(figures) == {
        "cost stored/hard": 1.5,
        "cost stored fused/hard fused": 4.0,
        "time fused/dense hard": 0.5,
        "temporary fused/dense hard": 0.25,
        "time fused/dense stored": pytest.approx(4 / 3),
        "temporary fused/dense stored": 0.25,
    }


def test_operations_of_a_step():
    assert acoustic_work.step_flops(84_412_080, 1024, 0) == 6 * 84_412_080 * 1024
    assert acoustic_work.step_flops(100, 2, 10) == 26 * 200


def test_hidden_layers_are_units_times_layers():
    assert acoustic_work.parse_hidden("2560x8") == (2560,) * 8
    for text in ("2560", "2560x", "0x8", "2560x8x2"):
        with pytest.raises(UserError, match="--hidden"):
            acoustic_work.parse_hidden(text)
