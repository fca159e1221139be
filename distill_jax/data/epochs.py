"""Epochs of a data set that is resident on the device, each run as one scanned program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax.errors import UserError
from distill_jax.training import Batch, Hyper, TrainState, TrainStep

Epoch = Callable[[TrainState, Batch, Array, Hyper], tuple[TrainState, dict[str, Array]]]


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Whole batches in an epoch; the remainder is left out, a different one every epoch."""
    if num_examples < batch_size:
        raise UserError(f"batch_size {batch_size} is more than the {num_examples} examples")
    return num_examples // batch_size


def make_epoch(
    step: TrainStep,
    batch_size: int,
    passes: int = 1,
    shard_batch: Callable[[Batch], Batch] = lambda batch: batch,
) -> Epoch:
    """Builds `run_epoch(state, examples, key, hyper) -> (state, metrics)`.

    The order of an epoch is a function of the key and the epoch's number alone, which is read off
    `state.step`; so an interrupted run goes on with the order it would have had.

    Args:
        step: from `make_train_step`.
        batch_size: B.
        passes: epochs to run in one call; for small sets, where one epoch is too short a program.
        shard_batch: lays a gathered batch out over devices (`parallel.shard_batch`).

    Returns:
        The epoch; `examples` are fields `[N, ...]`, the metrics `[passes * steps]` per step.
    """

    def one_pass(state: TrainState, examples: Batch, key: Array, hyper: Hyper):
        size = examples["label"].shape[0]
        steps = steps_per_epoch(size, batch_size)
        order_key, step_key = jax.random.split(key)
        order = jax.random.permutation(
            jax.random.fold_in(order_key, state.step // jnp.int32(steps)), size
        )

        def body(state: TrainState, rows: Array):
            batch = shard_batch({name: field[rows] for name, field in examples.items()})
            return step(state, batch, step_key, hyper)

        return jax.lax.scan(body, state, order[: steps * batch_size].reshape(steps, batch_size))

    def run_epoch(state: TrainState, examples: Batch, key: Array, hyper: Hyper):
        state, metrics = jax.lax.scan(
            lambda state, _: one_pass(state, examples, key, hyper), state, length=passes
        )
        return state, jax.tree.map(jnp.ravel, metrics)

    return run_epoch
