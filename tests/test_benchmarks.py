"""The benchmarks run, and their last line is the result."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks.mnist_epoch_jax import flops_per_example

ROOT = Path(__file__).parent.parent


def test_mnist_epoch_ends_with_its_result():
    # Three steps, on one device instead of conftest's eight; little optimised to compile sooner.
    flags = ["--batch_size=100", "--steps=0.005", "--rounds=1", "--nopytorch"]
    process = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.mnist_epoch", *flags],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = json.loads(process.stdout.splitlines()[-1])
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
