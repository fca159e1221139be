"""Frozen nets that members share, vmapped and split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from distill_jax import members, models, optimizers, sharding, step_losses
from distill_jax.ahead import trace_training
from distill_jax.recipe import Recipe
from distill_jax.train_step import online_teacher
from experiments.compiled.collectives import collectives

BATCH = 64
IMAGES = jax.random.randint(jax.random.key(0), (3, 6, 8, 8), 0, 256).astype(jnp.uint8)
PARAMS = {
    "kernel": jax.random.normal(jax.random.key(1), (3, 3, 1, 4)),
    "output": jax.random.normal(jax.random.key(2), (4 * 4 * 4, 5)),
}


def teacher(params, images):
    """By XLA's convolution, which is that of TPUs in `distill_jax.models`."""
    found = jax.lax.conv_general_dilated(
        images[..., None].astype(jnp.float32) / 255,
        params["kernel"],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return found.reshape(len(images), -1) @ params["output"]


def both(params, images):
    return {"logits": teacher(params, images), "first": images[..., 0, 0]}


@pytest.mark.parametrize("over_devices", [False, True])
@pytest.mark.parametrize("axes", [(None, 0), (0, 0), (0, None)])
def test_the_same_numbers_with_shared_and_own_parameters_and_inputs(axes, over_devices):
    own = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), PARAMS)
    params = PARAMS if axes[0] is None else own
    images = IMAGES[0] if axes[1] is None else IMAGES
    with members.spread(over_devices):
        found = jax.vmap(members.shared(both), axes)(params, images)
    tiny.assert_close(found, jax.vmap(both, axes)(params, images), rtol=1e-5)


@pytest.mark.parametrize(("sizes", "count"), [({"data": 8}, 3), ({"member": 8, "data": 1}, 8)])
def test_each_device_asks_the_teacher_of_its_own_examples_alone(sizes, count):
    program = compiled(sharding.make_mesh(**sizes), count)
    alone = compiled(sharding.make_mesh(devices=jax.devices()[:1]), count)
    share = program.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
    assert share < 1.5 / 8
    order = 4 * count * BATCH  # bytes of an epoch's rows; images are 64 times that, as float32
    found = collectives(program.as_text(), sharding.make_mesh(**sizes))
    assert all(one.bytes <= order for one in found if one.kind != "all-reduce")


def compiled(mesh, count):
    fields = {
        "inputs": jax.ShapeDtypeStruct((BATCH, 8, 8), np.uint8),
        "label": jax.ShapeDtypeStruct((BATCH,), np.int32),
    }
    recipe = Recipe(
        epochs=1,
        batch_size=BATCH,
        optimizer=lambda steps, epochs: optimizers.sgd(optax.constant_schedule(1.0)),
        transforms=[online_teacher(teacher)],
    )
    traced = trace_training(
        models.mlp((4,), 5),
        fields,
        step_losses.distillation_loss,
        recipe,
        members=count,
        mesh=mesh,
        own=["inputs"],
        numbers=("learning_rate", "temperature", "hard_weight"),
        constants={"teacher": jax.eval_shape(lambda: PARAMS)},
    )
    return traced.lower().compile({"xla_backend_optimization_level": 0})
