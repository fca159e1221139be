"""Image classification sets that don't fit in memory, read by number from ArrayRecord files.

The order of the examples in an epoch is a function of the seed and the epoch only, and is computed place
by place. Batch b of an epoch has the places b B..(b+1) B-1, of which each process reads its own rows. A
block of S batches is read at a time and trained on as one scanned program, while grain reads the next
blocks in threads.

The content of block b is a function of the seed and b only. So a resumed run can start at any block,
with any number of processes, and sees the same examples as one that was never stopped.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike, fspath
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from distill_jax.data import images
from distill_jax.data.images import Examples
from distill_jax.epochs import Epoch, count_examples, make_steps, steps_per_epoch, take_rows
from distill_jax.errors import UserError
from distill_jax.loop import Advance
from distill_jax.train_step import Batch, Constants, Hyper, TrainState, TrainStep

_CHUNK = 100  # records that are read at a time: photographs are about 1 MB each

Block = dict[str, np.ndarray]
"""The fields of S batches of training, on the host; the same shapes and dtypes for every block."""

Parse = Callable[[bytes], Mapping[str, ArrayLike]]
"""The fields of a record: "inputs" uint8 or floating point, "label" an integer, and any others; with the
same shapes and dtypes for all records."""


class Records(NamedTuple):
    """N examples that are read by number.

    size: N. read: numbers int `[n]` -> their examples, validated (`images.validate`): "id" int32
    `[n]`, "inputs" `[n, ...]`, "label" int32 `[n]`, and any other fields `[n, ...]`. Called by several
    threads at once.
    """

    size: int
    read: Callable[[np.ndarray], Examples]


class Cut(NamedTuple):
    """How an epoch is cut into blocks. steps: batches in a block, S. blocks: blocks in an epoch."""

    steps: int
    blocks: int


def from_tfds(prepared: images.Prepared, side: int = 0, split: str = "train") -> Records:
    """The records of a TFDS set. The ids are those of `images.load`: the order on disk.

    Args:
        prepared: from `images.open_prepared`.
        side: as for `images.load`.
        split: of the set.

    Raises:
        UserError: here or while reading, for a missing or damaged file, which the message names; for
            images of different sizes; as `images.validate`.
    """
    from tensorflow_datasets import decode

    info = prepared.builder.info
    source = prepared.builder.as_data_source(
        split, deserialize_method=decode.DeserializeMethod.RAW_BYTES
    )
    shards = [(file.filename, file.take) for file in info.splits[split].file_instructions]

    def parse(record: bytes) -> dict[str, ArrayLike]:
        example = info.features.deserialize_example_np(record)
        image = images.resize(example["image"], side) if side else example["image"]
        # A trailing axis of 1 is dropped, as in `images.Examples`.
        image = image[..., 0] if image.shape[2:] == (1,) else image
        return {"inputs": image, "label": np.int32(example["label"])}

    return _records(source, shards, parse, f"{prepared.name}, {split}", prepared.num_classes)


def from_files(
    paths: Sequence[str | PathLike[str]], parse: Parse, num_classes: int, name: str = "records"
) -> Records:
    """The records of ArrayRecord files, numbered from 0 in the order of the files.

    Write the files with `group_size:1`; otherwise each read decompresses a whole group of records.

    Args:
        paths: the files; ids depend on their order.
        parse: maps the bytes of a record to its fields; called by several threads at once.
        num_classes: C; labels must be in 0..C-1.
        name: of the set, for messages.

    Raises:
        UserError: as `from_tfds`; for a record for which `parse` raises any exception.
    """
    import grain

    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(_count, paths))
    shards = [(fspath(path), size) for path, size in zip(paths, sizes, strict=True)]
    if not sum(sizes):
        raise UserError(f"{name}: no records in {len(shards)} files")
    source = grain.sources.ArrayRecordDataSource([f"{path}[0:{size}]" for path, size in shards])
    return _records(source, shards, parse, name, num_classes)


def select(records: Records, numbers: np.ndarray) -> Records:
    """The records with these numbers; they keep their ids."""
    return Records(len(numbers), lambda places: records.read(numbers[places]))


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


def _count(path: str | PathLike[str]) -> int:
    import grain

    try:
        return len(grain.sources.ArrayRecordDataSource([fspath(path)]))
    except RuntimeError as error:
        raise UserError(f"{fspath(path)} is no readable ArrayRecord file ({error})") from error


def _records(
    source: Any, shards: Sequence[tuple[str, int]], parse: Parse, name: str, num_classes: int
) -> Records:
    """Records of a source that maps numbers to bytes; shards are (path, number of records)."""
    ends = np.cumsum([size for _, size in shards])
    size = int(ends[-1])
    if size > np.iinfo(np.int32).max:
        raise UserError(
            f"{name}: {size} records are more than ids of 32 bits can name: {2**31 - 1}"
        )

    def where(number: int) -> str:
        path, _ = shards[int(np.searchsorted(ends, number, side="right"))]
        return f"{name}: record {number}, in {path},"

    def fetch(numbers: list[int]) -> Sequence[bytes]:
        try:
            return source.__getitems__(numbers)
        except (RuntimeError, OSError) as error:
            if len(numbers) == 1:
                raise UserError(f"{where(numbers[0])} can't be read ({error})") from error
            return [fetch([number])[0] for number in numbers]  # finds the damaged one

    def example(number: int, record: bytes) -> Examples:
        try:
            fields = {name: np.asarray(value) for name, value in parse(record).items()}
            return {**fields, "id": np.array(number, np.int32)}
        except Exception as error:  # a parser may raise anything
            raise UserError(f"{where(number)} is damaged ({error})") from error

    first = example(0, fetch([0])[0])
    kinds = _kinds(first)

    def read(numbers: np.ndarray) -> Examples:
        arrays = {
            field: np.empty((len(numbers), *value.shape), value.dtype)
            for field, value in first.items()
        }
        for start in range(0, len(numbers), _CHUNK):
            chunk = numbers[start : start + _CHUNK].tolist()
            for row, (number, record) in enumerate(zip(chunk, fetch(chunk), strict=True), start):
                one = example(number, record)
                if _kinds(one) != kinds:
                    raise UserError(
                        f"{where(number)} has {_listed(one)}, but record 0 has {_listed(first)}; all "
                        "must be the same, and images of a TFDS set can be resized to one side"
                    )
                for field, value in one.items():
                    arrays[field][row] = value
        if len(numbers):
            images.validate(arrays, num_classes, name)
        return arrays

    return Records(size, read)


def _kinds(example: Examples) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (field.dtype, field.shape) for name, field in example.items()}


def _listed(example: Examples) -> str:
    return ", ".join(f"{name} {field.dtype} {list(field.shape)}" for name, field in example.items())
