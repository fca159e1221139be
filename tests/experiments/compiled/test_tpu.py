"""The studies' programs and the fused loss, by the compiler of TPUs; nothing is run."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import ahead, models, sharding, step_losses
from distill_jax.recipe import Recipe
from experiments.compiled import targets
from experiments.compiled.check import check
from experiments.compiled.collectives import collectives

pytest.importorskip("libtpu")
TARGET = targets.Target("v5e:2x2", targets.CHIPS["v5e"], (2, 2))
WIDTH, CLASSES, INPUTS, BATCH = 256, 1024, 128, 512


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in targets.QUIET.items():
            patch.setenv(name, value)
        # Optax's schedules rely on it.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield


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


def compiled(loss, *, fused=0, **arithmetic):
    """A step of a net of two layers on four chips, and where they are."""
    mesh = sharding.make_mesh(devices=targets.devices(TARGET))
    fields = {
        "inputs": jax.ShapeDtypeStruct((BATCH, INPUTS), np.float32),
        "label": jax.ShapeDtypeStruct((BATCH,), np.int32),
    }
    model = models.mlp((WIDTH,), CLASSES, **arithmetic)
    recipe = Recipe(epochs=1, batch_size=BATCH, fused_logits=fused)
    traced = ahead.trace_training(model, fields, loss, recipe, members=1, mesh=mesh)
    return traced.lower().compile(), mesh


WEIGHTS = INPUTS * WIDTH + WIDTH + WIDTH * CLASSES + CLASSES


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_gradients_of_bfloat16_arithmetic_are_summed_in_their_own_dtype(dtype, size):
    program, mesh = compiled(step_losses.label_loss, dtype=jnp.bfloat16, gradient_dtype=dtype)
    found = collectives(program.as_text(), mesh)
    largest = max(found, key=lambda one: one.bytes)
    assert (largest.kind, largest.axes) == ("all-reduce", ("data",))
    assert size * WEIGHTS <= largest.bytes < size * WEIGHTS + 1000


def test_the_fused_loss_has_no_logits_and_sends_its_sums_once():
    program, mesh = compiled(step_losses.label_loss, fused=1)
    assert f"f32[{BATCH // 4},{CLASSES}]" in compiled(step_losses.label_loss)[0].as_text()
    found = collectives(program.as_text(), mesh)
    assert {(one.kind, one.axes) for one in found} == {("all-reduce", ("data",))}
    assert sum(one.bytes for one in found) < 4 * WEIGHTS + 10_000
