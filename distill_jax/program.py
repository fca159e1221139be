"""What a training is made of, from shapes alone: what `trainer.train` runs and `ahead` compiles.

Nothing here needs the examples, or a device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax import epochs, models, platforms, ramps, shapes, sharding, train_step
from distill_jax.errors import UserError
from distill_jax.models import Model
from distill_jax.recipe import Examples, Reader, Recipe, Stream
from distill_jax.train_step import Loss


class Plan(NamedTuple):
    """How a training is cut. steps: in an epoch. units: dispatches in all. epochs: in a unit."""

    steps: int
    units: int
    epochs: float


class Program(NamedTuple):
    """A training's step, its optimizer, and its loss, which may be fused with the output layer."""

    step: train_step.TrainStep
    optimizer: optax.GradientTransformationExtraArgs
    objective: Loss | train_step.Fused


def make(
    model: Model,
    loss: Loss,
    recipe: Recipe,
    *,
    steps: int,
    classes: int,
    mesh: Any,
    schedules: Mapping[str, ramps.Schedule],
) -> Program:
    """The program of a training of `steps` steps in an epoch, with C `classes`."""
    objective = _fuse(recipe, model, loss, classes, mesh)
    # A sum over micro-batches or chunks of examples has more digits than its terms.
    is_sum = recipe.micro_batches > 1 or isinstance(objective, train_step.Fused)
    dtype = None if is_sum else models.gradient_dtype(model)
    optimizer = sharding.split_update(recipe.optimizer(steps, recipe.epochs), mesh, dtype)
    step = train_step.make_train_step(
        model,
        optimizer,
        objective,
        transforms=recipe.transforms,
        micro_batches=recipe.micro_batches,
        schedules=schedules,
    )
    return Program(sharding.keep_layout(step, mesh), optimizer, objective)


def cut(recipe: Recipe, examples: Sequence[Examples] | Stream, reader: Reader, name: str) -> Plan:
    """How a training is cut; a UserError for epochs that `report_every` doesn't divide."""
    if isinstance(examples, Stream):  # a unit is a block
        units = recipe.epochs * examples.blocks
        return Plan(examples.steps * examples.blocks, units, 1 / examples.blocks)
    if recipe.epochs % recipe.report_every:
        raise UserError(
            f"{name}: epochs {recipe.epochs} is not a multiple of report_every {recipe.report_every}"
        )
    steps = epochs.steps_per_epoch(reader.size(examples[0]), recipe.batch_size)
    return Plan(steps, recipe.epochs // recipe.report_every, recipe.report_every)


def sample_input(examples: Sequence[Examples] | Stream, gather: epochs.Gather) -> Any:
    """An input, or a tree of them, each `[1, ...]` of zeros, for its shape and dtype."""
    if isinstance(examples, Stream):
        return jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), examples.inputs)
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    inputs = jax.eval_shape(gather, dict(examples[0]), row)["inputs"]
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)


def num_classes(model: Model, sample: Any) -> int:
    """C, of the logits that a model gives for a sample."""
    logits = jax.eval_shape(lambda x: model.apply(model.init(jax.random.key(0), x), x), sample)
    return shapes.check(**{"what the model returns": (logits, "float ... C")})["C"]


def is_slow_in_loops(model: Model, sample: Any) -> bool:
    """Whether a model has convolutions, of which XLA runs the gradient slowly in a CPU's loops."""
    if platforms.current() != "cpu":
        return False
    variables = jax.eval_shape(model.init, jax.random.key(0), sample)
    return "conv_general_dilated" in str(jax.make_jaxpr(model.apply)(variables, sample))


def _fuse(
    recipe: Recipe, model: Model, loss: Loss, classes: int, mesh: Any
) -> Loss | train_step.Fused:
    """The loss fused with the output layer, if a batch has as many logits as the recipe says."""
    size = recipe.rows_at_once * classes
    if model.hidden is None or not 0 < recipe.fused_logits <= size:
        return loss
    return train_step.Fused(loss, over=sharding.over_data(mesh))
