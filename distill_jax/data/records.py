"""Examples that are read by number, from files that needn't fit in memory."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike, fspath
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from distill_jax.data.examples import Examples, validate
from distill_jax.errors import UserError

_CHUNK = 100  # records that are read at a time: photographs are about 1 MB each
_PROGRESS_SECONDS = 5
Item = TypeVar("Item")

Parse = Callable[[Any], Mapping[str, ArrayLike]]
"""The fields of a record (the bytes of one in a file): "inputs" uint8 or floating point, "label" an
integer, and any others; with the same shapes and dtypes for all records."""


class Records(NamedTuple):
    """N examples that are read by number.

    size: N. read: numbers int `[n]` -> their examples, validated (`examples.validate`): "id" int32
    `[n]`, "inputs" `[n, ...]`, "label" int32 `[n]`, and any other fields `[n, ...]`. Called by several
    threads at once. name: for messages.
    """

    size: int
    read: Callable[[np.ndarray], Examples]
    name: str = "records"


class OnDisk(NamedTuple):
    """A set that is opened but not read; ids and class names as those of a `Source`."""

    name: str
    num_classes: int
    train: Records
    test: Records
    class_names: tuple[str, ...]


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
        UserError: here or while reading, for a missing or damaged file, which the message names; for
            records that are not alike; as `examples.validate`; for a record for which `parse` raises
            any exception.
    """
    import grain

    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(_count, paths))
    shards = [(fspath(path), size) for path, size in zip(paths, sizes, strict=True)]
    if not sum(sizes):
        raise UserError(f"{name}: no records in {len(shards)} files")
    source = grain.sources.ArrayRecordDataSource([f"{path}[0:{size}]" for path, size in shards])
    return of_shards(source, shards, parse, num_classes, name=name)


def of_shards(
    source: Any,
    shards: Sequence[tuple[str, int]],
    parse: Parse,
    num_classes: int,
    *,
    name: str,
    first_id: int = 0,
    hint: str = "",
) -> Records:
    """`make` of a source that maps numbers to bytes; shards are (path, number of records)."""
    ends = np.cumsum([size for _, size in shards])

    def where(number: int) -> str:
        return f"record {number}, in {shards[int(np.searchsorted(ends, number, side='right'))][0]},"

    return make(
        source.__getitems__,
        int(ends[-1]),
        parse,
        num_classes,
        where=where,
        name=name,
        first_id=first_id,
        hint=hint,
    )


def make(
    fetch: Callable[[list[int]], Sequence[Any]],
    size: int,
    parse: Parse,
    num_classes: int,
    *,
    where: Callable[[int], str],
    name: str,
    first_id: int = 0,
    hint: str = "",
) -> Records:
    """Records of anything that is fetched by number, of which the first is read at once.

    Args:
        fetch: reads the records of some numbers, for `parse`.
        size: N.
        parse: maps what is fetched to fields.
        num_classes: C; labels must be in 0..C-1.
        where: names a record, for messages.
        name: of the set, for messages.
        first_id: id of record 0.
        hint: ends the message of records that are not alike.

    Raises:
        UserError: as `from_files`.
    """
    if first_id + size > np.iinfo(np.int32).max:
        raise UserError(
            f"{name}: {size} records are more than ids of 32 bits can name: {2**31 - 1}"
        )

    def fetch_each(numbers: list[int]) -> Sequence[Any]:
        try:
            return fetch(numbers)
        except (RuntimeError, OSError) as error:
            if len(numbers) == 1:
                raise UserError(f"{name}: {where(numbers[0])} can't be read ({error})") from error
            return [fetch_each([number])[0] for number in numbers]  # finds the damaged one

    def example(number: int, record: Any) -> Examples:
        try:
            fields = {name: np.asarray(value) for name, value in parse(record).items()}
            return {**fields, "id": np.array(first_id + number, np.int32)}
        except Exception as error:  # a parser may raise anything
            raise UserError(f"{name}: {where(number)} is damaged ({error})") from error

    first = example(0, fetch_each([0])[0])
    kinds = _kinds(first)

    def read(numbers: np.ndarray) -> Examples:
        arrays = _allocate(first, len(numbers), name)
        for start in range(0, len(numbers), _CHUNK):
            chunk = numbers[start : start + _CHUNK].tolist()
            for row, (number, record) in enumerate(
                zip(chunk, fetch_each(chunk), strict=True), start
            ):
                one = example(number, record)
                if _kinds(one) != kinds:
                    raise UserError(
                        f"{name}: {where(number)} has {_listed(one)}, but record 0 has "
                        f"{_listed(first)}; all must be the same{hint}"
                    )
                for field, value in one.items():
                    arrays[field][row] = value
        if len(numbers):
            validate(arrays, num_classes, name)
        return arrays

    return Records(size, read, name)


def select(records: Records, numbers: np.ndarray) -> Records:
    """The records with these numbers; they keep their ids."""
    return Records(len(numbers), lambda places: records.read(numbers[places]), records.name)


def read_all(records: Records) -> Examples:
    """All records as arrays in memory; a UserError if they don't fit there, and as `Records.read`."""
    whole: Examples = {}
    starts = range(0, records.size, _CHUNK)
    for start in watched(starts, records.size, _CHUNK, f"{records.name}: images read"):
        part = records.read(np.arange(start, min(start + _CHUNK, records.size)))
        # One array: a list that is put together at the end would need twice the memory.
        whole = whole or _allocate({k: v[0] for k, v in part.items()}, records.size, records.name)
        for field, values in part.items():
            whole[field][start : start + len(values)] = values
    return whole


def watched(items: Iterable[Item], size: int, each: int, what: str) -> Iterator[Item]:
    """The items, with a line every few seconds that says how many of `size` are done."""
    shown = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown > _PROGRESS_SECONDS:
            shown = time.monotonic()
            print(f"{what}: {min(number * each, size)} of {size}", flush=True)


def _allocate(one: Examples, size: int, name: str) -> Examples:
    """Arrays for so many records like one."""
    try:
        return {field: np.empty((size, *value.shape), value.dtype) for field, value in one.items()}
    except MemoryError as error:
        shape = [size, *one["inputs"].shape]
        raise UserError(
            f"{name}: images {shape} don't fit the memory; data.side is the size to which they can be "
            "resized"
        ) from error


def _count(path: str | PathLike[str]) -> int:
    import grain

    try:
        return len(grain.sources.ArrayRecordDataSource([fspath(path)]))
    except RuntimeError as error:
        raise UserError(f"{fspath(path)} is no readable ArrayRecord file ({error})") from error


def _kinds(example: Examples) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (field.dtype, field.shape) for name, field in example.items()}


def _listed(example: Examples) -> str:
    return ", ".join(f"{name} {field.dtype} {list(field.shape)}" for name, field in example.items())
