"""A small net's step, compiled for a machine that isn't there."""

from typing import Any

import jax
import numpy as np

from distill_jax import ahead, models, sharding
from distill_jax.recipe import Recipe
from experiments.compiled import targets

WIDTH, CLASSES, INPUTS = 256, 1024, 128
WEIGHTS = INPUTS * WIDTH + WIDTH + WIDTH * CLASSES + CLASSES


def compiled(
    target: targets.Target, loss: Any, *, batch: int = 512, fused: int = 0, **arithmetic: Any
):
    """The program of a net of two layers on all the target's devices, and their mesh."""
    mesh = sharding.make_mesh(devices=targets.devices(target))
    fields = {
        "inputs": jax.ShapeDtypeStruct((batch, INPUTS), np.float32),
        "label": jax.ShapeDtypeStruct((batch,), np.int32),
    }
    model = models.mlp((WIDTH,), CLASSES, **arithmetic)
    recipe = Recipe(epochs=1, batch_size=batch, fused_logits=fused)
    traced = ahead.trace_training(model, fields, loss, recipe, members=1, mesh=mesh)
    return traced.lower().compile(), mesh
