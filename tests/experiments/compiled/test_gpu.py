"""A step and the fused loss, by the compiler of GPUs; nothing is run, and no driver is needed."""

import importlib

import jax.numpy as jnp
import pytest
from compiled_nets import CLASSES, WIDTH, compiled

from distill_jax import step_losses
from experiments.compiled import targets
from experiments.compiled.check import check
from experiments.compiled.collectives import collectives

pytest.importorskip("jax_plugins.xla_cuda13")
pytestmark = pytest.mark.usefixtures("compilers")
TARGET = targets.Target("h100:4", targets.CHIPS["h100"], (4,))
KINDS, LARGE = ("reduce-scatter", "all-gather"), WIDTH * CLASSES


def test_a_step_of_a_study_fits_and_sends_its_gradients():
    config = importlib.import_module("experiments.speech.config").get_config("smoke")
    listed = importlib.import_module("experiments.speech.programs")
    training, *_ = check(
        config, listed.programs, listed.passes, [TARGET], ["ensemble"], evaluation=False
    )
    assert training["what"] == "training" and training["fits"] and training["flops"] > 0
    assert {(kind, axes) for kind, axes, *_ in training["sent"]} == {("all-reduce", "data")}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_replica_updates_its_part_of_the_large_weight(dtype):
    program, mesh = compiled(
        TARGET, step_losses.label_loss, dtype=jnp.bfloat16, gradient_dtype=dtype
    )
    found = collectives(program.as_text(), mesh)
    assert {one.axes for one in found} == {("data",)}
    bytes_of = {kind: max(x.bytes for x in found if x.kind == kind) for kind in KINDS}
    size = jnp.dtype(dtype).itemsize
    assert bytes_of == {"reduce-scatter": size * LARGE // 4, "all-gather": 4 * LARGE}


def test_the_fused_loss_has_no_logits():
    dense, fused = (
        compiled(TARGET, step_losses.label_loss, batch=8192, fused=size)[0].as_text()
        for size in (0, 1)
    )
    logits = f"f32[2048,{CLASSES}]"  # of a GPU
    assert logits in dense and logits not in fused
