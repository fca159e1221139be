"""What trains one unit of `loop.fit`, of all members as one program."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import epochs, loop, processes, sharding, train_step, training_note
from distill_jax.data.stream import make_advance
from distill_jax.recipe import Examples, Reader, Recipe, Stream


def advance_of(
    recipe: Recipe,
    step: train_step.TrainStep,
    *,
    mesh: Any,
    examples: Sequence[Examples] | Stream,
    reader: Reader,
    scanned: bool,
    shared: tuple[Array, dict[str, Any], tuple[dict[str, Any], dict[str, bool]]],
) -> loop.Advance:
    """What trains one unit: epochs of the resident examples, or a block of the stream.

    Epochs are one program, unless `scanned` is false: then each of their steps is, of one member after
    the other, since vmapped convolutions are slow on a CPU too.
    """
    keys, hyper, (constants, own_constants) = shared
    constants = sharding.put_examples(constants, mesh, own_constants)
    shard = sharding.shard_batch(mesh, recipe.batch_size)
    if isinstance(examples, Stream):
        run = examples.make_run(step, shard)
        compiled = sharding.compile_epoch(run, mesh, examples.per_member, own_constants)
        return make_advance(
            lambda states, block: compiled(states, block, keys, hyper, constants),
            examples.open_blocks,
            lambda block: examples.put(block, mesh),
        )
    fields, per_member = stack(examples)
    resident = sharding.put_examples(fields, mesh, per_member)
    if scanned:
        compiled = compile_epochs(
            recipe, step, mesh, reader, per_member=per_member, own_constants=own_constants
        )
        return lambda states, unit: compiled(states, resident, keys, hyper, constants)
    rows: dict[str, Any] = {"draw": reader.draw, "size": reader.size}
    batch: dict[str, Any] = {"shard_batch": shard, "gather": reader.gather}
    size, passes = recipe.batch_size, recipe.report_every
    compiled_of = functools.partial(
        sharding.compile_epoch, mesh=mesh, constants_per_member=own_constants, vmapped=False
    )
    order = compiled_of(epochs.make_order(size, **rows), per_member=per_member)
    with_rows = {**per_member, epochs.ROWS: True}
    one = compiled_of(epochs.make_one_step(step, **batch), per_member=with_rows)

    def advance(states: train_step.TrainState, unit: int) -> Any:
        found = []
        for _ in range(passes):
            states, drawn = order(states, resident, keys, hyper, constants)
            for _ in range(epochs.steps_per_epoch(reader.size(examples[0]), size)):
                epoch = {**resident, epochs.ROWS: processes.serialize_on_cpu(drawn)}
                states, sums = one(states, epoch, keys, hyper, constants)
                found.append(processes.serialize_on_cpu(sums))
        return states, jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *found)

    return advance


def compile_epochs(
    recipe: Recipe,
    step: train_step.TrainStep,
    mesh: Any,
    reader: Reader,
    *,
    per_member: Mapping[str, bool],
    own_constants: Mapping[str, bool],
) -> epochs.Epoch:
    """The epochs of one unit as one program (`sharding.compile_epoch`)."""
    run = epochs.make_epoch(
        step,
        recipe.batch_size,
        passes=recipe.report_every,
        shard_batch=sharding.shard_batch(mesh, recipe.batch_size),
        gather=reader.gather,
        draw=reader.draw,
        size=reader.size,
    )
    return sharding.compile_epoch(run, mesh, per_member, own_constants)


def stack(sets: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, bool]]:
    """The members' fields: one for all where they are equal, else `[M, ...]`; and which those are."""
    fields, per_member = {}, {}
    for name, first in sets[0].items() if sets else ():
        values = [one[name] for one in sets]
        same = all(training_note.is_same(value, first) for value in values)
        per_member[name] = not same
        fields[name] = first if same else jax.tree.map(lambda *leaves: np.stack(leaves), *values)
    return fields, per_member
