"""The parts of the accelerator's first minutes are run once each, and resumed."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks.accelerator_parts import Part, chip_of, parts, run_parts

PRINTS = Part("prints", ("-c", "print('a table'); print('{\"figures\": 3}')"))
FAILS = Part("fails", ("-c", "import sys; sys.exit('error: no such device')"))
SLEEPS = Part("sleeps", ("-c", "import time; time.sleep(60)"))


def test_results_are_kept_and_what_failed_is_run_again(tmp_path):
    found, left = run_parts([PRINTS, FAILS], tmp_path, 60)
    assert left == []
    assert found["prints"]["figures"] == 3 and found["prints"]["seconds"] > 0
    assert found["fails"]["error"] == "error: no such device"
    assert [path.name for path in tmp_path.glob("*.json")] == ["prints.json"]
    (tmp_path / "prints.json").write_text(json.dumps({"figures": 4}))
    found, _ = run_parts([PRINTS, FAILS], tmp_path, 60)
    assert found["prints"] == {"figures": 4} and "error" in found["fails"]


def test_what_the_time_does_not_suffice_for_is_left(tmp_path):
    found, left = run_parts([SLEEPS, PRINTS], tmp_path, 0.5)
    assert (found, left) == ({}, ["sleeps", "prints"])


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", None),
        ("cpu", None),
    ],
)
def test_the_chip_of_a_device(device, chip):
    assert chip_of(device) == chip
    compiled = [part for part in parts(Path("out"), device) if part.name.startswith("compiled")]
    assert len(compiled) == (2 if chip else 0)
    assert all(f"--compile_for={chip}:1" in part.arguments for part in compiled)
