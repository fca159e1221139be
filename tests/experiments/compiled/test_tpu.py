"""The studies' programs and the fused loss, by the compiler of TPUs; nothing is run."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_nets import CLASSES, WEIGHTS, compiled

from distill_jax import ahead, models, platforms, sharding, step_losses
from distill_jax.data import augment
from distill_jax.errors import UserError
from distill_jax.recipe import PLAIN, Recipe
from experiments.compiled import targets
from experiments.compiled.check import check
from experiments.compiled.collectives import collectives
from experiments.compiled.traffic import moved_bytes
from experiments.speech import frames

pytest.importorskip("libtpu")
TARGET = targets.Target("v5e:2x2", targets.CHIPS["v5e"], (2, 2))
pytestmark = pytest.mark.usefixtures("compilers")


@pytest.mark.parametrize(
    ("study", "stage"),
    [("mnist", "distilled"), ("speech", "ensemble"), ("specialists", "generalist")],
)
def test_a_step_of_each_study_sends_its_gradients_and_nothing_else(study, stage):
    config = importlib.import_module(f"experiments.{study}.config").get_config("smoke")
    listed = importlib.import_module(f"experiments.{study}.programs")
    training, *_ = check(
        config, listed.programs, listed.passes, [TARGET], [stage], evaluation=False
    )
    assert training["what"] == "training" and training["fits"]
    assert {(kind, axes) for kind, axes, *_ in training["sent"]} == {("all-reduce", "data")}
    ((*_, size),) = training["sent"]
    numbers = size - 4 * training["parameters"]
    assert 0 <= numbers < 10_000  # losses, errors and counts, of each step
    assert training["flops"] > 0 and training["moved"] > 0


@pytest.mark.parametrize(
    ("name", "size"), [("v5e:1", 1), ("v5e:1x1", 1), ("v5e:1x2", 2), ("v5p:1", 1), ("v6e:1", 1)]
)
def test_slices_smaller_than_a_host(name, size):
    (target,) = targets.parse([name])
    assert len(targets.devices(target)) == target.size == size


def test_another_shape_is_refused():
    with pytest.raises(UserError, match=r"--compile_for=v5e:5: .*Invalid topology layout"):
        targets.devices(targets.parse(["v5e:5"])[0])


def test_images_are_copied_once_and_not_to_larger_tiles():
    count, side = 40_000, 32
    fields = {
        "inputs": jax.ShapeDtypeStruct((count, side, side), np.uint8),
        "label": jax.ShapeDtypeStruct((count,), np.int32),
    }
    # In their order: to compile a shuffle of so many takes ten times as long.
    reader = PLAIN._replace(
        draw=lambda examples, key, steps, size: jnp.arange(steps * size).reshape(steps, size)
    )
    traced = ahead.trace_training(
        models.mlp((), 8),
        fields,
        step_losses.label_loss,
        Recipe(epochs=1, batch_size=512),
        members=1,
        mesh=sharding.make_mesh(devices=targets.devices(TARGET)),
        reader=reader,
    )
    compiled = traced.lower().compile()
    images = count * side**2
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * images  # 4 with 128 lanes for 32
    moved = moved_bytes(compiled.as_text())
    assert images < moved < 5 * images  # read and written once, not in each of 78 steps


def test_windows_and_shifted_images_are_not_cut_one_by_one():
    where = jax.sharding.SingleDeviceSharding(targets.devices(TARGET)[0])

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    images, numbers = shape(np.uint8, 64, 28, 28), shape(np.int32, 64)
    with platforms.compiling_for("tpu"):
        shifted = jax.jit(augment.shifts(2).make).lower(images, numbers, numbers)
        windows = jax.jit(frames.cut).lower(shape(np.uint8, 5000, 40), numbers)
    for program in (shifted, windows):
        assert "while(" not in program.compile().as_text()


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_gradients_of_bfloat16_arithmetic_are_summed_in_their_own_dtype(dtype, size):
    program, mesh = compiled(
        TARGET, step_losses.label_loss, dtype=jnp.bfloat16, gradient_dtype=dtype
    )
    found = collectives(program.as_text(), mesh)
    largest = max(found, key=lambda one: one.bytes)
    assert (largest.kind, largest.axes) == ("all-reduce", ("data",))
    assert size * WEIGHTS <= largest.bytes < size * WEIGHTS + 1000


def test_the_fused_loss_has_no_logits_and_sends_its_sums_once():
    program, mesh = compiled(TARGET, step_losses.label_loss, batch=8192, fused=1)
    dense, _ = compiled(TARGET, step_losses.label_loss, batch=8192)
    logits = f"f32[2048,{CLASSES}]"  # of a chip
    assert logits in dense.as_text() and logits not in program.as_text()
    found = collectives(program.as_text(), mesh)
    assert {(one.kind, one.axes) for one in found} == {("all-reduce", ("data",))}
    assert sum(one.bytes for one in found) < 4 * WEIGHTS + 10_000
