"""Sets of utterances that don't fit on the device, trained on block by block.

In every epoch the utterances are distributed to blocks at random. A block is packed like a resident set
(`frames.pack`), padded to one shape, and trained on as one scanned program, with the frames of all its
utterances in random order. Meanwhile grain reads the next blocks in threads.

The content of block b is a function of the seed and b only, so a resumed run can start at any block.
"""

import functools
import heapq
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax.data.stream import Block, read_ahead
from distill_jax.epochs import Epoch, make_steps
from distill_jax.errors import UserError
from distill_jax.train_step import Batch, Constants, Hyper, TrainState, TrainStep
from experiments.speech.frames import LEFT, RIGHT, gather_windows, pack


class Source(Protocol):
    """Utterances that are read by number, by several threads at once: "frames" uint8 `[n, 40]`, "states"
    int32 `[n]`, and any further fields `[n, ...]`, the same ones for all utterances."""

    def __len__(self) -> int: ...  # noqa: D105
    def __getitem__(self, number: int) -> Mapping[str, np.ndarray]: ...  # noqa: D105


class BlockSizes(NamedTuple):
    """Sizes of the blocks of a set.

    epoch: blocks in an epoch. least, most: bounds of the frames in a block, for all seeds and epochs.
    utterances: upper bound of the utterances in a block.
    """

    epoch: int
    least: int
    most: int
    utterances: int


def block_sizes(lengths: np.ndarray, block_frames: int) -> BlockSizes:
    """The bounds that hold for all blocks of all epochs.

    `plan` puts each utterance in the block with the fewest frames. So with T frames in all, L in the
    longest utterance and K blocks, every block has T / K frames, plus or minus L (1 - 1/K). K is the
    smallest number for which that is at most `block_frames`.

    Args:
        lengths: int `[U]`, frames of every utterance.
        block_frames: the maximum of frames in a block.

    Raises:
        UserError: for no utterances or an empty one; for more frames than int32 can count; or if blocks
            are so small, compared to the longest utterance, that one could be empty.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths) or lengths.min() < 1:
        empty = f"utterance {lengths.argmin()} has no frames" if len(lengths) else "no utterances"
        raise UserError(f"nothing to stream: {empty}")
    total, longest = int(lengths.sum()), int(lengths.max())
    if total > np.iinfo(np.int32).max:
        raise UserError(f"{total} frames are more than ids of 32 bits can name: {2**31 - 1}")
    epoch = 1
    if block_frames < total:
        epoch = -(-(total - longest) // max(block_frames - longest, 1))
    least = -(-(total - (epoch - 1) * longest) // epoch)
    most = (total + (epoch - 1) * longest) // epoch
    if least < 1 or most > block_frames:
        raise UserError(
            f"block_frames is {block_frames}, but utterance {lengths.argmax()} alone has {longest} "
            "frames: set it to many times that, so that the frames of many utterances are mixed"
        )
    fit = np.searchsorted(np.cumsum(np.sort(lengths)), most, side="right")
    return BlockSizes(epoch, least, most, int(fit))


def steps_per_block(lengths: np.ndarray, block_frames: int, batch_size: int) -> int:
    """Number of batches in a block: those of the smallest possible block.

    With L as in `block_sizes`, fewer than `2 L + batch_size` frames of a block are not used, and fewer
    than `L + batch_size` in the mean over an epoch. They are other frames in every epoch.

    Raises:
        UserError: if a block may be smaller than a batch.
    """
    least = block_sizes(lengths, block_frames).least
    if least < batch_size:
        raise UserError(
            f"blocks of at most {block_frames} frames (block_frames) may have only {least}, less "
            f"than one batch of {batch_size}: set it to several times the longest utterance, which "
            f"has {np.max(lengths)}"
        )
    return least // batch_size


def plan(lengths: np.ndarray, block_frames: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Distributes the utterances of an epoch, in an order drawn from (seed, epoch), to its blocks.

    Args:
        lengths: int `[U]`, frames of every utterance.
        block_frames: the maximum of frames in a block.
        seed: at least 0.
        epoch: its number, from 0.

    Returns:
        For each of the `block_sizes(...).epoch` blocks the numbers of its utterances, int64, ascending.
        Every utterance is in exactly one block.
    """
    sizes = block_sizes(lengths, block_frames)
    blocks: list[list[int]] = [[] for _ in range(sizes.epoch)]
    heap = [(0, number) for number in range(sizes.epoch)]
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
    for utterance, length in zip(order.tolist(), np.asarray(lengths)[order].tolist(), strict=True):
        filled, number = heap[0]
        blocks[number].append(utterance)
        heapq.heapreplace(heap, (filled + length, number))
    return [np.sort(np.array(block, np.int64)) for block in blocks]


def blocks(
    source: Source,
    lengths: np.ndarray,
    block_frames: int,
    seed: int,
    *,
    first_block: int = 0,
    end: int = sys.maxsize,
    read_threads: int = 2,
    prefetch: int = 2,
) -> Iterator[Block]:
    """Reads blocks `first_block..end-1`, over all epochs; block b belongs to epoch b // (their number).

    A block has the fields of `frames.pack`, padded to one length, so all blocks have the same shapes and
    dtypes; and "count" int32 `[]`, the number of examples before the padding. "id" is the number of the
    frame in the whole source, and "utterance" that of its utterance; these and "label" are -1 in the
    padding.

    Args:
        source: of utterances.
        lengths: int `[U]`, frames of every utterance.
        block_frames: the maximum of frames in a block.
        seed: of the epochs' orders.
        first_block: number of the first block; a resumed run starts at its next one.
        end, read_threads, prefetch: as for `distill_jax.data.stream.read_ahead`.

    Raises:
        UserError: as `block_sizes`; while reading, if an utterance does not have the length in `lengths`
            or the fields of the others, and as `frames.pack`.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(source) != len(lengths):
        raise UserError(f"{len(lengths)} lengths for a source of {len(source)} utterances")
    sizes = block_sizes(lengths, block_frames)
    first_ids = np.cumsum(lengths) - lengths
    plan_of = functools.lru_cache(maxsize=2)(lambda epoch: plan(lengths, block_frames, seed, epoch))

    def read(number: int) -> Block:
        epoch, place = divmod(number, sizes.epoch)
        return _read_block(source, lengths, first_ids, plan_of(epoch)[place], sizes)

    return read_ahead(read, first_block, end, read_threads=read_threads, prefetch=prefetch)


def make_block_epoch(
    step: TrainStep,
    batch_size: int,
    steps: int,
    shard_batch: Callable[[Batch], Batch] = lambda batch: batch,
) -> Epoch:
    """Builds `run_block(state, block, key, hyper) -> (state, metrics [steps])`.

    The order of the frames in a block is a function of the key and the number of the block, which
    follows from `state.step`. The padding is never drawn.

    Args:
        step: from `train_step.make_train_step`; its batches are those of `frames.gather_windows`.
        batch_size: B.
        steps: steps in a block, from `steps_per_block`.
        shard_batch: shards a gathered batch over devices (`sharding.shard_batch`).
    """
    run_steps = make_steps(step, shard_batch, gather_windows)

    def run_block(
        state: TrainState, block: Batch, key: Array, hyper: Hyper, constants: Constants = None
    ) -> tuple[TrainState, dict[str, Array]]:
        order_key, step_key = jax.random.split(key)
        order_key = jax.random.fold_in(order_key, state.step // jnp.int32(steps))
        order = _order(order_key, block["label"].shape[0], block["count"])
        rows = order[: steps * batch_size].reshape(steps, batch_size)
        examples = {name: field for name, field in block.items() if name != "count"}
        return run_steps(state, (examples, rows), step_key, hyper, constants)

    return run_block


def _order(key: Array, size: int, count: Array) -> Array:
    """A permutation of `size` rows: the first `count` in random order, then the others."""
    bits = jax.random.bits(key, (size,), jnp.uint32) >> jnp.uint32(1)
    filling = jnp.arange(size, dtype=jnp.int32) >= count
    return jnp.argsort(jnp.where(filling, jnp.uint32(2**32 - 1), bits))


def _read_block(
    source: Source,
    lengths: np.ndarray,
    first_ids: np.ndarray,
    utterances: np.ndarray,
    sizes: BlockSizes,
) -> Block:
    items = [source[number] for number in utterances.tolist()]
    for number, item in zip(utterances, items, strict=True):
        if set(item) != {"frames", "states", *items[0]}:
            raise UserError(
                f"utterance {number} has the fields {sorted(item)}, expected frames, states and "
                f"those of utterance {utterances[0]}: {sorted(items[0])}"
            )
        if len(item["frames"]) != lengths[number]:
            raise UserError(
                f"utterance {number} has {len(item['frames'])} frames, but the lengths say "
                f"{lengths[number]}"
            )
    columns = {name: [item[name] for item in items] for name in items[0]}
    block = pack(columns.pop("frames"), columns.pop("states"), columns, utterances)
    own = lengths[utterances]
    block["id"] += np.repeat(first_ids[utterances] - (np.cumsum(own) - own), own).astype(np.int32)
    return _fill_up(block, sizes)


def _fill_up(block: Block, sizes: BlockSizes) -> Block:
    """Pads a block to the shape of all blocks; the windows of the padding are real ones."""
    fillers = {"id": -1, "label": -1, "utterance": -1, "position": LEFT}
    rows = sizes.most + (LEFT + RIGHT) * sizes.utterances
    filled: Block = {"count": np.array(len(block["label"]), np.int32)}
    for name, field in block.items():
        size = rows if name == "frames" else sizes.most
        padding = [(0, size - len(field))] + [(0, 0)] * (field.ndim - 1)
        filled[name] = np.pad(field, padding, constant_values=fillers.get(name, 0))
    return filled
