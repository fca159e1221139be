"""What is compiled for a machine, and what is said of it. The machine is one of CPUs here."""

import importlib
import types

import jax
import numpy as np
import pytest

from distill_jax import sharding
from experiments.common import programs
from experiments.common.programs import Pass
from experiments.compiled import check, targets

CPUS = targets.parse(["cpu:2"])


def compiled(name, *stages):
    study = importlib.import_module(f"experiments.{name}.programs")
    config = importlib.import_module(f"experiments.{name}.config").get_config("smoke")
    return check.check(config, study.programs, study.passes, CPUS, stages, evaluation=False)


def test_the_teachers_pass_over_the_training_set():
    (record,) = compiled("mnist", "soft_targets")
    weights = 784 * 256 + 256 * 256 + 256 * 10
    assert (record["what"], record["program"]) == ("soft targets", "soft_targets: logits")
    assert record["parameters"] == weights + 256 + 256 + 10
    assert record["flops"] == 2 * weights * 4000
    assert record["output"] == 4000 * 10 * 4 and record["fits"] and record["sent"] == []


@pytest.mark.parametrize(
    ("study", "stages", "names"),
    [
        (
            "mnist",
            ("shift_targets", "distorted_targets"),
            ["shift_targets: logits", "distorted_targets: logits"],
        ),
        ("speech", ("soft_targets",), ["soft_targets: ensemble", "soft_targets: one"]),
        ("specialists", ("clusters",), ["clusters: logits"]),
        (
            "specialists",
            ("soft_targets",),
            ["soft_targets: a specialist", "soft_targets: q of Eq. 5"],
        ),
    ],
)
def test_other_passes(study, stages, names):
    records = compiled(study, *stages)
    assert [record["program"] for record in records] == names
    assert all(record["what"] == "soft targets" and record["fits"] for record in records)


@pytest.mark.parametrize(
    ("message", "fits", "verdict"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory", False, "DOESN'T FIT"),
        ("INTERNAL: a fault of the compiler", None, "DOESN'T COMPILE"),
    ],
)
def test_what_can_not_be_compiled(capsys, message, fits, verdict):
    def fail():
        raise jax.errors.JaxRuntimeError(message)

    traced = types.SimpleNamespace(lower=lambda: types.SimpleNamespace(compile=fail))
    program = types.SimpleNamespace(trace=lambda params: traced)
    config = importlib.import_module("experiments.mnist.config").get_config("smoke")
    listed = [("teacher", Pass("logits", program, (), (np.float32(0),), 1))]
    (record,) = check.check(config, lambda _: iter(()), lambda _: iter(listed), CPUS)
    assert record["fits"] is fits and record["error"] == message
    assert f"soft targets teacher: logits: {verdict}: {message}\n" in capsys.readouterr().out


def test_the_part_of_each_process():
    def mesh(*sizes, each):
        found = [types.SimpleNamespace(process_index=n // each) for n in range(np.prod(sizes))]
        shape = dict(zip(sharding.AXES, sizes, strict=True))
        return types.SimpleNamespace(devices=np.array(found).reshape(sizes), shape=shape)

    assert check._of_processes(mesh(1, 4, 1, each=4)) == ""
    assert check._of_processes(mesh(1, 8, 1, each=4)) == "; 2 processes: data 0-3; data 4-7"
    assert check._of_processes(mesh(1, 2, 4, each=4)) == (
        "; 2 processes: data 0, model 0-3; data 1, model 0-3"
    )
    many = check._of_processes(mesh(1, 24, 1, each=4))
    assert many == "; 6 processes: data 0-3; data 4-7; data 8-11; ...; data 20-23"


def test_trainings_with_other_transforms_are_other_programs():
    config = importlib.import_module("experiments.mnist.config").get_config("smoke")
    _, one = next(importlib.import_module("experiments.mnist.programs").programs(config))
    shows = [lambda batch, key, constants: batch for _ in range(2)]
    named = [
        ("stage", one._replace(name=name, transforms=(shows[i],)))
        for name, i in (("a", 0), ("b", 1), ("c", 0))
    ]
    assert list(programs.distinct(iter(named))) == ["stage: a, stage: c", "stage: b"]
