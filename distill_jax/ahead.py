"""The programs of a training and of soft targets, traced ahead of time from shapes alone.

`traced.lower().compile()` then asks the compiler of a machine that may not be there, and runs nothing.
"""

import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax import epochs, evaluator, platforms, program, sharding, train_step, units
from distill_jax.models import Model
from distill_jax.recipe import PLAIN, Reader, Recipe
from distill_jax.train_step import Loss

Shapes = Mapping[str, jax.ShapeDtypeStruct]
"""Fields of N examples `[N, ...]`."""


class Blocks(NamedTuple):
    """A set that is streamed (`recipe.Stream`), whose fields are those of one block.

    make_run: as of the stream. steps: batches in a block. inputs: one input's shape and dtype.
    batch_axis: of the block's fields, split over "data"; None: all devices have the whole block.
    """

    make_run: Callable[[train_step.TrainStep, epochs.ShardBatch], epochs.Epoch]
    steps: int
    inputs: jax.ShapeDtypeStruct
    batch_axis: int | None = None


def trace_training(
    model: Model,
    examples: Shapes,
    loss: Loss,
    recipe: Recipe,
    *,
    members: int,
    mesh: Any,
    own: Collection[str] = (),
    numbers: Collection[str] = ("learning_rate",),
    constants: Mapping[str, Any] = types.MappingProxyType({}),
    own_constants: Collection[str] = (),
    reader: Reader = PLAIN,
    blocks: Blocks | None = None,
) -> jax.stages.Traced:
    """One unit of `trainer.train`: `recipe.report_every` epochs of all members, or a block.

    Args:
        model, loss, recipe, reader: as for `trainer.train`.
        examples: of one member.
        members: M.
        mesh: of `sharding.make_mesh`, over the devices of a topology too.
        own: the fields that each member has of its own; all others are shared.
        numbers: the names of the traced numbers.
        constants: shapes for one member, such as {"teacher": parameters}.
        own_constants: those that each member has of its own.
        blocks: how the set is streamed, if it is.

    Raises:
        UserError: for sizes that don't fit each other or the mesh.
    """
    with platforms.compiling_for(_platform(mesh)):
        steps, sample = cut(examples, recipe, reader, blocks)
        classes = program.num_classes(model, sample)
        made = program.make(
            model, loss, recipe, steps=steps, classes=classes, mesh=mesh, schedules={}
        )
        keys = _keys(members)
        states = jax.eval_shape(
            jax.vmap(lambda key: train_step.init_state(model, made.optimizer, key, sample)), keys
        )
        per_member, of_constants = _which(examples, own), _which(constants, own_constants)
        if blocks is None:
            compiled: Any = units.compile_epochs(
                recipe, made.step, mesh, reader, per_member=per_member, own_constants=of_constants
            )
        else:
            run = blocks.make_run(made.step, sharding.shard_batch(mesh, recipe.batch_size))
            compiled = sharding.compile_epoch(run, mesh, per_member, of_constants)
        return compiled.trace(
            _placed(states, sharding.state_shardings(states, mesh, "member")),
            _of_members(examples, own, members, mesh, blocks and blocks.batch_axis),
            keys,
            {name: jax.ShapeDtypeStruct((members,), jnp.float32) for name in numbers},
            _of_members(constants, own_constants, members, mesh),
        )


def cut(examples: Shapes, recipe: Recipe, reader: Reader, blocks: Blocks | None) -> tuple[int, Any]:
    """The steps of an epoch, or of a block; and an input `[1, ...]` of zeros."""
    if blocks is None:
        steps = program.cut(recipe, [examples], reader, "net").steps
        return steps, program.sample_input([examples], reader.gather)
    return blocks.steps, jnp.zeros((1, *blocks.inputs.shape), blocks.inputs.dtype)


def trace_evaluation(
    model: Model,
    examples: Shapes,
    recipe: Recipe,
    *,
    members: int,
    mesh: Any,
    own: Collection[str] = (),
    reader: Reader = PLAIN,
) -> jax.stages.Traced:
    """What counts the members' errors on a set of examples after each unit."""
    with platforms.compiling_for(_platform(mesh)):
        sample = program.sample_input([examples], reader.gather_evaluated)
        variables = jax.eval_shape(jax.vmap(lambda key: model.init(key, sample)), _keys(members))
        states = train_step.TrainState(jnp.zeros(members, jnp.int32), variables, ())
        shardings = sharding.state_shardings(states, mesh, "member")
        laid = _of_members(examples, own, members, mesh)
        count = evaluator.compile_errors(model, reader, recipe.rows_at_once, mesh)
        return count.trace(
            _placed(variables, shardings.params),
            {name: field for name, field in laid.items() if name in own},
            {name: field for name, field in laid.items() if name not in own},
        )


def trace_on_one(
    function: Any, static: Sequence[Any], arrays: Sequence[Any], *, mesh: Any
) -> jax.stages.Traced:
    """A jitted function of static arguments, and of arrays that lie on the mesh's first device."""
    with platforms.compiling_for(_platform(mesh)):
        return function.trace(*static, *_placed(tuple(arrays), sharding.on_first(mesh)))


def _platform(mesh: Any) -> str:
    name = mesh.devices.flat[0].platform
    return "gpu" if name == "cuda" else name


def _keys(members: int) -> Array | Any:
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), members))


def _placed(tree: Any, shardings: Any) -> Any:
    """Shapes that lie as the shardings say, each for a leaf or for a whole subtree."""

    def place(lies: Any, part: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies), part
        )

    return jax.tree.map(place, shardings, tree)


def _which(fields: Mapping[str, Any], own: Collection[str]) -> dict[str, bool]:
    """Whether each field is each member's own."""
    return {name: name in own for name in fields}


def _of_members(
    fields: Mapping[str, Any],
    own: Collection[str],
    members: int,
    mesh: Any,
    batch_axis: int | None = None,
) -> dict[str, Any]:
    """All members' fields where `sharding.put_examples` puts them; their own have an axis of members.

    With a `batch_axis`, where `put_rows` does.
    """

    def with_axis(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((members, *leaf.shape), leaf.dtype)

    whole = {
        name: jax.tree.map(with_axis, field) if name in own else field
        for name, field in fields.items()
    }
    where = sharding.example_shardings(mesh, _which(fields, own))
    if batch_axis is not None:
        where = {name: sharding.rows_sharding(mesh, batch_axis + (name in own)) for name in fields}
    return _placed(whole, where)
