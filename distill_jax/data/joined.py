"""Examples that are read by number, joined to their soft targets as they are read.

Every example that is read is checked to be the one that the teacher saw under its id. So a store can't
be joined to other data, or to augmented views: augment afterwards, or let a teacher look on
(`training.online_teacher`).
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from distill_jax import compressed_targets, soft_targets
from distill_jax.compressed_targets import Store
from distill_jax.data.images import Examples
from distill_jax.data.stream import Records

DigestsOf = Callable[[Examples], np.ndarray]
"""Examples `[n, ...]` -> the digests of their inputs, uint64 `[n]`."""


class Source(Protocol):
    """What grain reads from: examples by number, each a mapping of fields; with "id", or it is the
    number. Read by several threads at once."""

    def __len__(self) -> int: ...  # noqa: D105
    def __getitem__(self, number: int) -> Mapping[str, Any]: ...  # noqa: D105


def image_digests(examples: Examples) -> np.ndarray:
    """`soft_targets.digests` of "inputs"."""
    return soft_targets.digests(examples["inputs"])


def join(
    records: Records, store: Store, temperature: float, digests_of: DigestsOf = image_digests
) -> Records:
    """Records with the three fields of `compressed_targets.rows`.

    Args:
        records: all those of the store, or a part of them.
        store: from `compressed_targets.load`.
        temperature: that training will use.
        digests_of: as the store's own were computed.

    Raises:
        UserError: for another temperature; while reading, for an id without targets, or other inputs
            under an id.
    """

    def read(numbers: np.ndarray) -> Examples:
        examples = records.read(numbers)
        return compressed_targets.attach(examples, store, digests_of(examples), temperature)

    none = np.zeros(0, np.int64)
    compressed_targets.check(store, none, none, temperature)
    return Records(records.size, read)


class JoinedSource:
    """Examples with their soft targets as a source for grain, read in threads.

        grain.MapDataset.source(JoinedSource(source, store, 2.0)).shuffle(seed=0).batch(256)

    An item has the example's fields, "id", and those of `compressed_targets.rows`. A batch that has
    "id" can be joined as a whole, which takes less time:

        dataset.batch(256).map(lambda batch: attach(batch, store, image_digests(batch), 2.0))

    Args:
        source: of single examples, or `Records`.
        store, temperature, digests_of: as for `join`, and so are the errors.
    """

    def __init__(
        self,
        source: Source | Records,
        store: Store,
        temperature: float,
        digests_of: DigestsOf = image_digests,
    ):
        records = source if isinstance(source, Records) else _records(source)
        self._records = join(records, store, temperature, digests_of)

    def __len__(self) -> int:
        """How many examples there are."""
        return self._records.size

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """One example, its fields without a leading axis."""
        read = self._records.read(np.array([number]))
        return {name: field[0] for name, field in read.items()}


def _records(source: Source) -> Records:
    def read(numbers: np.ndarray) -> Examples:
        items = [{"id": number, **source[number]} for number in numbers.tolist()]
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    return Records(len(source), read)
