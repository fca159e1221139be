"""Epochs of examples that lie on the device, each run as one scanned program."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax import members, ranges
from distill_jax.batches import as_matrices, check_rows, count_rows, rows_of
from distill_jax.errors import UserError
from distill_jax.train_step import Batch, Constants, Hyper, TrainState, TrainStep

Epoch = Callable[[TrainState, Batch, Array, Hyper, Constants], tuple[TrainState, dict[str, Array]]]
"""`(state, examples, key, hyper, constants) -> (state, metrics [steps])`."""

ShardBatch = Callable[[Batch], Batch]
"""Lays a batch out over the devices: `sharding.shard_batch`."""

Gather = Callable[[Batch, Array], Batch]
"""`(examples, rows [B]) -> batch`: how a batch is made of the examples, inside the program."""

Draw = Callable[[Batch, Array, int, int], Array]
"""`(examples, key, steps, batch size) -> rows int32 [steps, B]`: which examples an epoch takes."""

ROWS = "rows of the epoch"
"""The field of the examples that `make_one_step` takes its rows from."""


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Whole batches in an epoch; the remainder is left out, a different one every epoch."""
    ranges.check(batch_size=batch_size)
    if num_examples < batch_size:
        raise UserError(f"batch_size {batch_size} is more than the {num_examples} examples")
    return num_examples // batch_size


def take_rows(examples: Batch, rows: Array) -> Batch:
    """The batch of plain examples: every field `[N, ...]` at the rows `[B]`.

    Raises:
        UserError: for a field of another length.
    """
    check_rows(examples, count_examples(examples), "a set of")
    return {
        name: jax.tree.map(lambda x: rows_of(x, rows), field) for name, field in examples.items()
    }


def count_examples(examples: Mapping[str, Any]) -> int:
    """The examples in an epoch: all, N; read off their labels, or their inputs if they have none."""
    name = "label" if "label" in examples else "inputs"
    return count_rows(examples[name], name)


def shuffle(examples: Batch, key: Array, steps: int, batch_size: int) -> Array:
    """Each example at most once, in random order: rows int32 `[steps, B]`."""
    order = jax.random.permutation(key, count_examples(examples))
    return order[: steps * batch_size].reshape(steps, batch_size)


def make_epoch(
    step: TrainStep,
    batch_size: int,
    *,
    passes: int = 1,
    shard_batch: ShardBatch = lambda batch: batch,
    gather: Gather = take_rows,
    draw: Draw = shuffle,
    size: Callable[[Batch], int] = count_examples,
) -> Epoch:
    """Builds `run_epoch(state, examples, key, hyper, constants=None) -> (state, metrics)`.

    The order of an epoch is a function of the key and the epoch's number alone, which is read off
    `state.step`. So a resumed run takes the examples in the order that it would have had.

    Args:
        step: from `make_train_step`.
        batch_size: B.
        passes: epochs to run in one call; for small sets, where one epoch is too short a program.
        shard_batch: applied to each batch.
        gather: makes the batch of the examples at some rows.
        draw: chooses the rows of an epoch's batches.
        size: how many examples make an epoch, from the shapes of their fields.

    Returns:
        The epoch; `examples` are fields `[N, ...]` (or what `gather` takes), the metrics
        `[passes * steps]` per step.
    """
    ranges.check_value("passes", passes, ranges.count())
    order = make_order(batch_size, draw=draw, size=size)

    def one_pass(
        state: TrainState, examples: Batch, key: Array, hyper: Hyper, constants: Constants
    ) -> tuple[TrainState, dict[str, Array]]:
        state, rows = order(state, examples, key, hyper, constants)
        _, step_key = jax.random.split(key)
        matrices, images = as_matrices(examples)
        run_steps = make_steps(step, shard_batch, lambda fields, rows: gather(images(fields), rows))
        return run_steps(state, (matrices, rows), step_key, hyper, constants)

    def run_epoch(
        state: TrainState, examples: Batch, key: Array, hyper: Hyper, constants: Constants = None
    ) -> tuple[TrainState, dict[str, Array]]:
        state, metrics = jax.lax.scan(
            lambda state, _: one_pass(state, examples, key, hyper, constants), state, length=passes
        )
        return state, jax.tree.map(jnp.ravel, metrics)

    return run_epoch


def make_order(
    batch_size: int, *, draw: Draw = shuffle, size: Callable[[Batch], int] = count_examples
) -> Any:
    """Builds what gives the state and an epoch's rows int32 `[steps, B]`, as `make_epoch` takes them.

    Called as an epoch is, before its first step. For steps that are programs of their own.
    """

    def run_order(
        state: TrainState, examples: Batch, key: Array, hyper: Hyper, constants: Constants = None
    ) -> tuple[TrainState, Array]:
        order_key, _ = jax.random.split(key)
        steps = steps_per_epoch(size(examples), batch_size)
        epoch_key = jax.random.fold_in(order_key, state.step // jnp.int32(steps))
        return state, draw(examples, epoch_key, steps, batch_size)

    return run_order


def make_one_step(
    step: TrainStep,
    *,
    shard_batch: ShardBatch = lambda batch: batch,
    gather: Gather = take_rows,
) -> Epoch:
    """Builds one step of the epoch that `make_epoch` scans: the one that `state.step` is at.

    It is called with the epoch's rows (`make_order`) among the examples, as `ROWS`; its metrics are
    `[1]`. For steps that are slow inside a loop, as convolutions are on a CPU.
    """

    def run_step(
        state: TrainState, examples: Batch, key: Array, hyper: Hyper, constants: Constants = None
    ) -> tuple[TrainState, dict[str, Array]]:
        fields, rows = {**examples}, examples[ROWS]
        del fields[ROWS]
        _, step_key = jax.random.split(key)
        batch = gather(fields, rows[state.step % jnp.int32(len(rows))])
        state, metrics = step(state, shard_batch(batch), step_key, hyper, constants)
        return state, jax.tree.map(lambda x: x[None], metrics)

    return run_step


def make_steps(step: TrainStep, shard_batch: ShardBatch, gather: Gather) -> Any:
    """Builds `run_steps(state, (examples, rows [steps, B]), key, hyper, constants)`.

    It gives `(state, metrics [steps])`, one scanned step for each line of rows; arguments as for
    `make_epoch`.
    """

    def run_steps(
        state: TrainState,
        examples_and_rows: tuple[Batch, Array],
        key: Array,
        hyper: Hyper,
        constants: Constants,
    ) -> tuple[TrainState, dict[str, Array]]:
        examples, rows = examples_and_rows

        def one(state: TrainState, rows: Array) -> tuple[TrainState, dict[str, Array]]:
            return step(state, shard_batch(gather(examples, rows)), key, hyper, constants)

        return jax.lax.scan(one, state, rows)

    return run_steps


def of_members(
    run_epoch: Epoch,
    per_member: Mapping[str, bool],
    constants_per_member: Mapping[str, bool],
    *,
    vmapped: bool,
    over_devices: bool,
) -> Epoch:
    """Builds the epoch of M members of that of one; `sharding.compile_epoch` compiles it.

    Args:
        run_epoch, per_member, constants_per_member: as there.
        vmapped: if false, the program has one member after the other.
        over_devices: whether the members are split over devices.

    Returns:
        `(states, examples, keys [M], hyper of [M], constants) -> (states, metrics [M, steps])`.
    """
    in_axes = (0, _axes(per_member), 0, 0, _axes(constants_per_member))
    mapped = jax.vmap(run_epoch, in_axes=in_axes, spmd_axis_name="member")

    def run_members(
        states: TrainState, examples: Batch, keys: Array, hyper: Hyper, constants: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        # An axis of one member makes no difference but in time: a tenth of a step on a CPU.
        if len(keys) > 1 and vmapped:
            with members.spread(over_devices):
                return mapped(states, examples, keys, hyper, constants)
        found = []
        for m in range(len(keys)):
            state, key, numbers = jax.tree.map(lambda leaf, m=m: leaf[m], (states, keys, hyper))
            fields = _of_member(m, examples, per_member)
            own_constants = _of_member(m, constants, constants_per_member)
            found.append(run_epoch(state, fields, key, numbers, own_constants))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return run_members


def _axes(per_member: Mapping[str, bool]) -> dict[str, int | None]:
    return {name: 0 if own else None for name, own in per_member.items()}


def _of_member(m: int, fields: Batch, per_member: Mapping[str, bool]) -> Batch:
    """The fields of one member, where some have a member axis."""
    return {
        name: jax.tree.map(lambda leaf: leaf[m], field) if per_member[name] else field
        for name, field in fields.items()
    }
