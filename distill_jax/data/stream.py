"""Training on sets that don't fit in memory, whose examples are read by number (`records.Records`).

The order of the examples in an epoch is a function of the seed and the epoch only, and is computed place
by place. Batch b of an epoch has the places b B..(b+1) B-1, of which each process reads its own rows. A
block of S batches is read at a time and trained on as one scanned program, while grain reads the next
blocks in threads.

The content of block b is a function of the seed and b only. So a resumed run can start at any block,
with any number of processes, and sees the same examples as one that was never stopped.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax.data.records import Records
from distill_jax.epochs import Epoch, count_examples, make_steps, steps_per_epoch, take_rows
from distill_jax.errors import UserError
from distill_jax.loop import Advance
from distill_jax.train_step import Batch, Constants, Hyper, TrainState, TrainStep

Block = dict[str, np.ndarray]
"""The fields of S batches of training, on the host; the same shapes and dtypes for every block."""


class Cut(NamedTuple):
    """How an epoch is cut into blocks. steps: batches in a block, S. blocks: blocks in an epoch."""

    steps: int
    blocks: int


def cut(size: int, batch_size: int, block_examples: int) -> Cut:
    """Cuts epochs of `size` examples into blocks of equal size.

    A block has at most `block_examples` and more than half as many (or it is the whole epoch). Of all
    such sizes it has the one with the fewest batches left over at the end of an epoch. These are not
    used, like a last batch that is not full; they are other examples in every epoch.

    Raises:
        UserError: if a block, or the whole set, is smaller than a batch.
    """
    epoch = steps_per_epoch(size, batch_size)
    most = min(block_examples // batch_size, epoch)
    if most < 1:
        raise UserError(
            f"block_examples is {block_examples}, less than one batch of {batch_size}: set it to "
            "many times that"
        )
    steps = min(range(most // 2 + 1, most + 1), key=lambda steps: (epoch % steps, -steps))
    return Cut(steps, epoch // steps)


def order(size: int, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
    """The numbers of the examples at some places of an epoch's order.

    Args:
        size: N examples.
        seed: at least 0.
        epoch: its number, from 0.
        places: int `[n]` in 0..N-1.

    Returns:
        int64 `[n]`; over all places, a permutation of 0..N-1.
    """
    from grain.experimental import index_shuffle

    # Hashed together: with their sum, epoch 1 of seed 0 would have the order of epoch 0 of seed 1.
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    shuffled = (
        index_shuffle(place, max_index=size - 1, seed=mixed, rounds=4) for place in places.tolist()
    )
    return np.fromiter(shuffled, np.int64, len(places))


def blocks(
    records: Records,
    batch_size: int,
    block_examples: int,
    seed: int,
    rows: np.ndarray,
    *,
    first_block: int = 0,
    end: int = sys.maxsize,
    read_threads: int = 2,
    prefetch: int = 2,
) -> Iterator[Block]:
    """Reads this process's rows of the blocks `first_block..end-1`, over all epochs.

    With S and `blocks` of `Cut`, step s of block b is step `(b mod blocks) S + s` of epoch
    `b // blocks`.

    Args:
        records: all N of them, on every process.
        batch_size: B, over all processes.
        block_examples: as for `cut`.
        seed: of the epochs' orders.
        rows: int `[b]`, the positions in a batch that this process reads (`sharding.own_rows`).
        first_block: number of the first block; a resumed run starts at its next one.
        end, read_threads, prefetch: as for `read_ahead`.

    Returns:
        Blocks of fields `[S, b, ...]`.

    Raises:
        UserError: as `cut`, and while reading, as `records.read`.
    """
    steps, per_epoch = cut(records.size, batch_size, block_examples)

    def read(number: int) -> Block:
        epoch, place = divmod(number, per_epoch)
        places = (place * steps + np.arange(steps)[:, None]) * batch_size + rows
        examples = records.read(order(records.size, seed, epoch, places.ravel()))
        return {
            name: field.reshape(*places.shape, *field.shape[1:]) for name, field in examples.items()
        }

    return read_ahead(read, first_block, end, read_threads=read_threads, prefetch=prefetch)


def read_ahead(
    read: Callable[[int], Block], first: int, end: int, *, read_threads: int, prefetch: int
) -> Iterator[Block]:
    """The blocks `read(first)..read(end - 1)`, in order, read ahead in threads.

    Args:
        read: returns the block of a number.
        first: number of the first block; a resumed run starts at its next one.
        end: number after the last block.
        read_threads: blocks that are read at the same time; 0 reads each when it is needed.
        prefetch: blocks that are read ahead, and so held in the host's memory; at least
            `read_threads`.

    Raises:
        UserError: if `prefetch` is below `read_threads`. While reading, whatever `read` raises.
    """
    if 0 < prefetch < read_threads or (read_threads > 0) != (prefetch > 0):
        raise UserError(
            f"prefetch is {prefetch} and read_threads {read_threads}: prefetch must be at least "
            "read_threads, or both must be 0"
        )
    import grain  # takes more than a second, and resident sets don't need it

    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(first, end).map(read).to_iter_dataset(options))


def make_block_epoch(step: TrainStep, shard_batch: Callable[[Batch], Batch]) -> Epoch:
    """Builds `run_block(state, block, key, hyper) -> (state, metrics [S])`.

    Args:
        step: from `train_step.make_train_step`.
        shard_batch: from `sharding.shard_batch`. A block's fields are `[S, B, ...]`, put on the
            devices by `sharding.put_rows` with a `batch_axis` of 1, so that no data has to move.
    """
    run_steps = make_steps(step, shard_batch, take_rows)

    def run_block(
        state: TrainState, block: Batch, key: Array, hyper: Hyper, constants: Constants = None
    ) -> tuple[TrainState, dict[str, Array]]:
        steps = jnp.arange(count_examples(block), dtype=jnp.int32)
        return run_steps(state, (block, steps), key, hyper, constants)

    return run_block


def make_advance(
    run_block: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]],
    open_blocks: Callable[[int], Iterable[Block]],
    put: Callable[[Block], Batch],
) -> Advance:
    """Builds `advance(state, unit)` for `loop.fit`, where a unit is a block.

    A block is copied to the device while the block before it is trained on, so the device holds two.

    Args:
        run_block: `(states, block) -> (states, metrics)`, compiled (`sharding.compile_epoch`).
        open_blocks: returns the blocks from a given number on:
            `lambda first: blocks(..., first_block=first)`.
        put: copies a block to the devices (`sharding.put_examples` or `sharding.put_rows`).
    """
    opened: dict[int, Iterator[Block]] = {}  # one iterator, by the number of its next block

    def advance(state: TrainState, unit: int) -> tuple[TrainState, dict[str, Array]]:
        iterator = opened.pop(unit, None)
        if iterator is None:  # the first call, or not the unit after the last one
            opened.clear()
            iterator = iter(open_blocks(unit))
        block = next(iterator)
        opened[unit + 1] = iterator
        return run_block(state, put(block))

    return advance
