"""The store of soft targets: opened, and joined to examples by their ids.

Every example is kept by its id, with a digest of its input, so soft targets can't be joined to
shuffled, changed or augmented inputs. `writer` makes stores.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from distill_jax import files
from distill_jax.errors import UserError
from distill_jax.soft_targets import encodings, identity, shard_files, sources
from distill_jax.soft_targets.encodings import FIELDS, TOP_K_FIELDS
from distill_jax.soft_targets.reduction import Meta, array_name, has_tail_weights
from distill_jax.soft_targets.sources import Views


class Store(NamedTuple):
    """A teacher's soft targets for N examples; from `load`, read with `rows` or `attach`.

    meta: the arguments of `write`, and "num_examples". shards: the memory-mapped arrays of each, by
    name. by_id: the ids int64 `[N]` in ascending order, and the row of each; None if ids are rows.
    tail_weights: float32 `[C]` by temperature, the mean distribution; none of a "dense"
    store, None of one of `write_top_k`, whose rest is shared equally.
    """

    meta: Meta
    shards: list[dict[str, np.ndarray]]
    by_id: tuple[np.ndarray, np.ndarray] | None
    tail_weights: dict[float, np.ndarray | None]


def load(
    folder: str | os.PathLike[str],
    *,
    teacher: str | None = None,
    data: Mapping[str, str] | None = None,
    num_classes: int | None = None,
) -> Store:
    """Opens a finished store, reading it once to check its SHA-256; None skips a check.

    Args:
        folder: that `write` finished.
        teacher: the fingerprint that the targets must have.
        data: what must identify the inputs.
        num_classes: C that they must have.

    Raises:
        UserError: naming both sides, for a store of another teacher, of other data, of another class
            count or of another version; for one that is not finished, or damaged.

    Examples:
        >>> import tempfile
        >>> from distill_jax import soft_targets
        >>> folder = tempfile.mkdtemp()
        >>> soft_targets.write(folder, np.zeros((4, 3)), np.arange(4, dtype=np.uint64), teacher="resnet")
        >>> load(folder, teacher="vit")
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: ...teacher...
    """
    folder = files.local_path(folder)
    expected = {"teacher": teacher, "data": data and dict(data), "num_classes": num_classes}
    meta, folders = shard_files.open_finished(
        folder, {name: value for name, value in expected.items() if value is not None}
    )
    arrays = [_map(path, meta) for path in folders]
    by_id = None
    if meta["ids"] is not None:
        ids = np.concatenate([shard["ids"] for shard in arrays])
        order = np.argsort(ids)
        by_id = ids[order], order
    weights: dict[float, np.ndarray | None] = {}
    if meta["encoding"] != "dense":
        for t in meta["temperatures"]:
            path = shard_files.tail_weights_file(folder, t)
            weights[t] = np.load(path) if has_tail_weights(meta) else None
    return Store(meta, arrays, by_id, weights)


def rows(
    store: Store, ids: ArrayLike, temperature: float | None = None, *, views: Views | None = None
) -> dict[str, np.ndarray]:
    """The soft targets of some examples, in any order.

    Args:
        store: from `load`.
        ids: integer `[n]`.
        temperature: one of the store's; None for one that serves every temperature.
        views: the scheme whose views the targets must be of; None: of the inputs as they are.

    Returns:
        of a "dense" store "teacher_logits" float32 `[n, C]`, or `views.field` `[n, V, C]`; else
        `TOP_K_FIELDS`: "teacher_ids" `[n, k]`, "teacher_probabilities" bfloat16 `[n, k]` and
        "teacher_tail" `[n]`. Of a "sampled" store the probabilities are float32 `[n, 1]`, 1 / k, and the
        tail 0: the same loss serves both.

    Raises:
        UserError: for an id that the store doesn't have, another temperature, or other views.

    Examples:
        >>> import tempfile
        >>> from distill_jax import soft_targets
        >>> folder, digests = tempfile.mkdtemp(), np.arange(2, dtype=np.uint64)
        >>> soft_targets.write(folder, np.array([[1.0, 2.0], [3.0, 4.0]]), digests, teacher="t")
        >>> print(rows(load(folder), np.array([1, 0]))["teacher_logits"])
        [[3. 4.]
         [1. 2.]]
    """
    _check_views(store, views)
    made_at, places = _made_at(store, temperature), _places(store, ids)
    encoding, k, num_classes = (store.meta[name] for name in ("encoding", "k", "num_classes"))
    kept = [_take(store, array_name(field, made_at), places) for field in FIELDS[encoding]]
    if encoding == "dense":
        return {"teacher_logits" if views is None else views.field: kept[0]}
    if encoding == "sampled":
        kept = [*encodings.as_targets(encodings.unpack(kept[0], k, num_classes))]
    return dict(zip(TOP_K_FIELDS, kept, strict=True))


def attach(
    examples: Mapping[str, Any],
    store: Store,
    temperature: float | None = None,
    digests: ArrayLike | None = None,
    *,
    views: Views | None = None,
) -> dict[str, Any]:
    """Joins soft targets to examples by id: the examples' fields, and those of `rows`.

    The examples may be a part of the store's, in any order. Each one's input is checked to be the one
    that the teacher saw. Inputs that are augmented in the step need soft targets of all views
    (`write_views`), or such as are computed there (`train_step.online_teacher`). A grain data set is
    joined by batches, in its threads too:

        dataset.batch(256).map(lambda batch: soft_targets.attach(batch, store, 2.0))

    Args:
        examples: with "id" `[n]` and, unless digests are given, "inputs" `[n, ...]`.
        store: from `load`.
        temperature: that training will use; None for a store that serves every temperature.
        digests: uint64 `[n]`, of these examples' inputs; None: `soft_targets.digests` of "inputs".
        views: the scheme of a store of views (`write_views`), which `augment.random_view` will show. The
            inputs stay as they are, and are checked so.

    Raises:
        UserError: for examples without "id" or "inputs", an id without targets, other inputs under an
            id, another temperature, or other views.

    Examples:
        >>> import tempfile
        >>> from distill_jax import soft_targets
        >>> folder, inputs = tempfile.mkdtemp(), np.array([[1.0], [2.0]])
        >>> logits, digests = np.array([[1.0, 2.0], [3.0, 4.0]]), identity.digests(inputs)
        >>> soft_targets.write(folder, logits, digests, teacher="t")
        >>> joined = attach({"id": np.array([1]), "inputs": inputs[1:]}, load(folder))
        >>> print(joined["teacher_logits"])
        [[3. 4.]]
        >>> attach({"id": np.array([1]), "inputs": inputs[:1]}, load(folder))
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: 1 of 1 examples are not the inputs that teacher t saw ...
    """
    for name in ("id",) if digests is not None else ("id", "inputs"):
        if name not in examples:
            raise UserError(
                f"examples have {', '.join(examples) or 'no fields'}, not {name!r}: soft targets are "
                "joined by ids, and checked to be of these inputs"
            )
    found = identity.digests(examples["inputs"]) if digests is None else digests
    check(store, examples["id"], found, temperature)
    return {**examples, **rows(store, examples["id"], temperature, views=views)}


def check(
    store: Store, ids: ArrayLike, digests: ArrayLike, temperature: float | None = None
) -> None:
    """Raises the errors of `attach`; for a program that reads the rows later.

    Args:
        store: from `load`.
        ids: integer `[n]`, of the examples.
        digests: uint64 `[n]`, of their inputs.
        temperature: that training will use.

    Examples:
        >>> import tempfile
        >>> from distill_jax import soft_targets
        >>> folder, digests = tempfile.mkdtemp(), np.arange(4, dtype=np.uint64)
        >>> soft_targets.write(folder, np.zeros((4, 3)), digests, teacher="t")
        >>> check(load(folder), np.array([2]), digests[[2]])
    """
    _made_at(store, temperature)
    ids, found = identity.as_ids(ids), identity.as_digests(digests)
    if len(found) != len(ids):
        raise UserError(f"{len(found)} digests for {len(ids)} examples")
    differs = _take(store, "digests", _places(store, ids)) != found
    if differs.any():
        raise UserError(
            f"{differs.sum()} of {len(ids)} examples are not the inputs that teacher "
            f"{store.meta['teacher']} saw under their ids, first id {ids[differs.argmax()]}: the data "
            "have changed since the soft targets were made; make them again"
        )


def bytes_per_example(store: Store) -> int:
    """What an example takes on the disk: its digest's 8 bytes, and its targets at all temperatures.

    Examples:
        >>> import tempfile
        >>> from distill_jax import soft_targets
        >>> folder = tempfile.mkdtemp()
        >>> soft_targets.write(folder, np.zeros((4, 3)), np.arange(4, dtype=np.uint64), teacher="t")
        >>> bytes_per_example(load(folder))  # 3 logits and a digest
        20
    """
    arrays = [array for shard in store.shards for array in shard.values()]
    return sum(array.nbytes for array in arrays) // store.meta["num_examples"]


def _map(shard: Path, meta: Meta) -> dict[str, np.ndarray]:
    """The memory-mapped arrays of a shard, without the sums of its targets."""
    arrays: dict[str, np.ndarray] = {}
    for path in shard.glob("*.npy"):
        if not path.stem.startswith("sum_"):
            arrays[path.stem] = np.load(path, mmap_mode="r")
        if path.stem.startswith("probabilities_"):  # stored as bits
            arrays[path.stem] = arrays[path.stem].view(jnp.bfloat16)
    return arrays


def _check_views(store: Store, views: Views | None) -> None:
    """Raises a UserError if the targets are of other views, or of none."""
    there = store.meta.get("views")  # stores of before have none
    if there == sources.describe_views(views):
        return
    found = "the inputs as they are" if there is None else "{count} views {name}".format(**there)
    wanted = "the inputs as they are" if views is None else f"{views.num_views} views {views.name}"
    raise UserError(
        f"the soft targets of teacher {store.meta['teacher']} are of {found}, and can't be joined to "
        f"{wanted}: hand their scheme to attach as `views`, and show them by augment.random_view"
    )


def _made_at(store: Store, temperature: float | None) -> float | None:
    """The temperature whose arrays are read; None if they serve every one."""
    made_at, teacher, mean = (store.meta[name] for name in ("temperatures", "teacher", "mean"))
    if made_at is None:
        return None
    if temperature is None or temperature not in made_at:
        raise UserError(
            f"the soft targets of teacher {teacher} are {f'an {mean} mean ' if mean else ''}at "
            f"temperature {' and '.join(map(str, made_at))} and can't be used at temperature "
            f"{temperature}"
        )
    return float(temperature)


def _places(store: Store, ids: ArrayLike) -> np.ndarray:
    """The rows of some ids."""
    size, ids = store.meta["num_examples"], identity.as_ids(ids)
    if store.by_id is None:
        places, there = ids, (ids >= 0) & (ids < size)
    else:
        ordered, rows = store.by_id
        found = np.minimum(np.searchsorted(ordered, ids), size - 1)
        places, there = rows[found], ordered[found] == ids
    missing = ids[~there]
    if len(missing):
        held = (0, size - 1) if store.by_id is None else store.by_id[0][[0, -1]]
        raise UserError(
            f"{len(missing)} of {len(ids)} examples have no soft targets, first id {missing[0]}; the "
            f"store holds {size} examples, ids {held[0]} to {held[1]}, of teacher "
            f"{store.meta['teacher']}"
        )
    return places


def _take(store: Store, name: str, places: np.ndarray) -> np.ndarray:
    """Rows of one array, from whatever shards they are in."""
    numbers, within = np.divmod(places, store.meta["shard_rows"])
    first = store.shards[0][name]
    taken = np.empty((len(places), *first.shape[1:]), first.dtype)
    for number in np.unique(numbers):
        here = numbers == number
        taken[here] = store.shards[number][name][within[here]]
    return taken
