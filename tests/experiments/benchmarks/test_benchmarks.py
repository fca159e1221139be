"""The benchmarks run, and their last line is the result."""

import math

import jax
import jax.numpy as jnp
import pytest
from command import benchmark

from experiments.benchmarks import scaling_compiled, scaling_plan
from experiments.benchmarks.mnist_epoch_jax import flops_per_example
from experiments.compiled import targets


def test_mnist_epoch_ends_with_its_result():
    # Three steps.
    result = benchmark(
        "mnist_epoch", "--batch_size=100", "--steps=0.005", "--rounds=1", "--nopytorch"
    )
    assert result["benchmark"] == "mnist_epoch"
    assert result["device"] in ("cpu", "gpu")
    assert set(result["figures"]) == {
        "ours teacher",
        "ours student",
        "vmapped student",
        "in_turn student",
    }
    assert set(result["ratios"]) == {"in_turn/vmapped student"}
    numbers = [*result["ratios"].values()]
    for figures in result["figures"].values():
        assert figures.get("compile_seconds", 0) >= 0
        numbers += [figures["epoch_seconds"], figures["gflop_per_second"]]
    assert all(math.isfinite(number) and number > 0 for number in numbers)


@pytest.mark.parametrize(
    ("layers", "flops"),
    [
        ([2, 3], 2 * 6 + 2 * 6),  # no gradient of the inputs
        ([784, 1200, 1200, 10], 12_475_200),
        ([784, 800, 800, 10], 6_396_800),
    ],
)
def test_flops_are_those_of_the_matrix_products(layers, flops):
    assert flops_per_example(layers) == flops


def test_scaling_ends_with_its_result():
    result = benchmark("scaling", "--nets=mnist", "--devices=1,2", "--batch_size=64", "--rounds=1")
    assert (result["benchmark"], result["device"]) == ("scaling", jax.default_backend())
    figures = result["figures"]
    assert set(figures) == {
        "mnist strong data 1",
        "mnist strong data 2",
        "mnist strong model 2",
        "mnist weak data 2",
    }
    assert all(math.isfinite(n) and n > 0 for n in result["ratios"].values())
    # Beyond the gradients the sums of the loss, errors and known labels, 4 bytes each, and half of each
    # large weight's new values: a CPU's compiler makes no reduce-scatter, which would save as much.
    gathered = 4 * (784 * 1200 + 1200 * 1200) / 2
    for way in ("strong", "weak"):
        point = figures[f"mnist {way} data 2"]
        assert point["on_paper"] == 4 * scaling_plan.parameter_count((784, 1200, 1200, 10))
        assert point["sent"] == point["on_paper"] + 12 + gathered
    assert figures["mnist strong data 1"]["sent"] == 0


@pytest.mark.parametrize(
    ("layers", "model", "values"),
    [
        ((4, 6, 10, 8), 1, 0),
        ((4, 6, 10, 8), 2, 10 + 10),  # out of the second layer, and back into it
        ((4, 6, 10, 7), 2, 10),  # an output layer that is whole
        ((4, 6, 8), 2, 6 + 6),
        ((4, 6, 10, 12, 8), 2, 6 + 6 + 12 + 12),
    ],
)
def test_values_reduced_over_model(layers, model, values):
    assert scaling_plan.reduced_values(layers, model) == values


def test_bytes_on_paper():
    assert scaling_plan.parameter_count(scaling_plan.ACOUSTIC) == 84_412_080
    assert scaling_plan.ring_bytes("all-reduce", 800.0, 8) == 1400.0
    assert scaling_plan.ring_bytes("all-gather", 800.0, 8) == 700.0
    assert scaling_plan.ring_bytes("reduce-scatter", 100.0, 8) == 700.0
    gradients = 2 * 7 / 8 * 4 * 84_412_080
    assert scaling_plan.step_bytes(scaling_plan.ACOUSTIC, 1024, 8, 1) == gradients
    assert (
        scaling_plan.step_bytes(scaling_plan.ACOUSTIC, 1024, 1, 8) == 2 * 7 / 8 * 4 * 1024 * 20480
    )
    # Over two pairs: half of the parameters' gradients, and half of the batch's activations.
    both = 4 * 84_412_080 / 2 + 2 * 512 * 20480
    assert scaling_plan.step_bytes(scaling_plan.ACOUSTIC, 1024, 2, 2, activation=2) == both


def test_large_output_compiled_times_a_cpu_and_compares_the_losses():
    sizes = ("--machines=cpu:1", "--sizes=256x16x2000", "--dtype=float32", "--rounds=1")
    result = benchmark("large_output_compiled", *sizes)
    assert (result["benchmark"], result["dtype"]) == ("large_output_compiled", "float32")
    dense, fused = (result["figures"][f"cpu:1 256x16x2000 {way}"] for way in ("dense", "fused"))
    assert fused["temporary_bytes"] < dense["temporary_bytes"]
    assert dense["output_bytes"] == fused["output_bytes"] > 4 * 16 * (256 + 2000)
    assert fused["ms"] > 0 and fused["off_by"] < 1e-6 and dense["off_by"] < 1e-6


def test_a_compiled_step_sends_about_what_the_plan_says():
    layers = (64, 128, 128, 64)
    (machine,) = targets.parse(["cpu:4"])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        net = scaling_compiled.acoustic(layers, 64)
        found = scaling_compiled.compile_step(net, 2, 2, machine)
        images = jnp.zeros((1, 227 * 227 * 3), jnp.uint8)
        specialist = jax.eval_shape(
            scaling_compiled.krizhevsky(301).init, jax.random.key(0), images
        )
    assert 57.9e6 < sum(x.size for x in jax.tree.leaves(specialist)) < 58.2e6  # as planned
    planned = scaling_plan.step_bytes(layers, 64, 2, 2, scaling_plan.BFLOAT16)
    plan = scaling_plan.Plan(1, 2, 2, 0.001, 1.0, 1.0, 1.0)
    row = scaling_compiled.compare(found, planned, plan)
    # A CPU's activations travel in float32; biases are not split.
    assert 1.0 < row["sent_mb"] / row["planned_mb"] < 1.5
    assert row["memory_mb"] > 3 * 4 * scaling_plan.parameter_count(layers) / 2 / 1e6
    assert scaling_compiled.target_name(scaling_plan.CLUSTERS[0], 16) == "v5e:4x4"


def test_a_plan_loses_what_chips_idle_and_communication_takes():
    job = scaling_plan.Job("nets", 3, 1_000_000, 6e6, 0, 1e6, 64, (1,))
    fast = scaling_plan.Cluster("fast", 4, 1e12, math.inf, 2, math.inf, math.inf)
    assert scaling_plan.plans(job, fast)[0].efficiency == 1.0  # one after another on all four
    slow = fast._replace(link=1e6, outside=1e6)
    alone = scaling_plan.plans(job, slow)[0]
    assert (alone.at_once, alone.data, alone.efficiency) == (3, 1, 0.75)
    # Two chips of a group send 4 MB in 4 s; beside that, each computes 32 examples.
    pair = next(plan for plan in scaling_plan.plans(job, slow) if plan.data == 2)
    assert pair.step == pytest.approx(4 + 32 * 6e6 / 0.5e12)
    # Four are two groups: half of it goes between them as well.
    whole = next(plan for plan in scaling_plan.plans(job, slow) if plan.data == 4)
    assert whole.step == pytest.approx(4 + 2 + 16 * 6e6 / 0.5e12)


def test_sums_of_gradients_in_bfloat16_are_off_by_more_with_more_replicas():
    result = benchmark(
        "gradient_sums", "--replicas=2,16", "--batch_size=64", "--steps=2", "--seeds=1"
    )
    figures = result["figures"]
    assert figures["2 float32"]["error_at_start"] == figures["16 float32"]["error_at_start"] == 0
    few, many = (figures[f"{n} bfloat16"]["error_at_start"] for n in (2, 16))
    assert 0 < few < many < 0.02
