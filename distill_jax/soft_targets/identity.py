"""What names a teacher, the examples, and the inputs that it saw."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from distill_jax.batches import count_rows
from distill_jax.errors import UserError
from distill_jax.models import Params


def digests(inputs: ArrayLike | Mapping[str, Any]) -> np.ndarray:
    """A 64-bit hash of every example's input: `[N, ...]` of any dtype -> uint64 `[N]`.

    Of a tree of arrays in dicts, tuples or NamedTuples, each example's parts are hashed together.

    Raises:
        UserError: for a single number, or Python objects, such as lists of different lengths; for arrays
            of other lengths in a tree.

    Examples:
        >>> images = np.zeros((3, 28, 28), np.uint8)
        >>> images[2] = 255
        >>> first, second, third = digests(images)
        >>> bool(first == second), bool(first == third)
        (True, False)
    """
    if isinstance(inputs, Mapping | tuple):
        count_rows(inputs)
        return digests(np.stack([digests(leaf) for leaf in jax.tree.leaves(inputs)], axis=1))
    try:
        rows = np.asarray(inputs)
    except ValueError as error:
        raise UserError(f"inputs are no array: {error}") from error
    if rows.ndim < 1 or rows.dtype == object:
        raise UserError(
            f"inputs are an array {rows.shape} of {rows.dtype}; expected [N, ...] of numbers or text, "
            "of one shape for every example"
        )
    size = rows.nbytes // max(len(rows), 1)
    content = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
    hashes = [
        hashlib.blake2b(content[i * size : (i + 1) * size], digest_size=8) for i in range(len(rows))
    ]
    return np.frombuffer(b"".join(one.digest() for one in hashes), np.uint64)


def as_ids(ids: ArrayLike) -> np.ndarray:
    """Examples' ids as int64 `[n]`; a UserError if they are anything but whole numbers.

    Examples:
        >>> as_ids([3, 1])
        array([3, 1])
    """
    found = np.asarray(ids)
    if found.ndim != 1 or not (np.issubdtype(found.dtype, np.integer) or not found.size):
        raise UserError(
            f"ids are an array {found.shape} of {found.dtype}; expected whole numbers [n], one for each "
            "example: number other names, such as file names, and keep the list"
        )
    if found.size and found.max() > np.iinfo(np.int64).max:
        raise UserError(f"ids go up to {found.max()}; expected numbers of 63 bits")
    return found.astype(np.int64)


def as_digests(values: ArrayLike) -> np.ndarray:
    """Inputs' digests as uint64 `[n]`; a UserError if `digests` can't have made them.

    Examples:
        >>> as_digests(digests(np.zeros((2, 3)))).shape
        (2,)
    """
    found = np.asarray(values)
    if found.ndim != 1 or found.dtype != np.uint64:
        raise UserError(
            f"digests are an array {found.shape} of {found.dtype}; expected uint64 [n] as "
            "soft_targets.digests gives them, in NumPy: JAX cuts numbers of 64 bits to 32"
        )
    return found


def own_ids(ids: ArrayLike | None, size: int) -> np.ndarray | None:
    """Ids int64 `[N]`; None if they are the rows, which need not be stored.

    Raises:
        UserError: if they are anything but N distinct whole numbers.

    Examples:
        >>> print(own_ids([0, 1], 2), own_ids([4, 1], 2))
        None [4 1]
    """
    if ids is None:
        return None
    ids = as_ids(ids)
    if ids.shape != (size,):
        raise UserError(f"ids are {ids.shape} for {size} digests; expected ({size},)")
    if len(np.unique(ids)) != size:
        raise UserError("soft targets need examples with distinct ids")
    return None if np.array_equal(ids, np.arange(size)) else ids


def fingerprint(params: Params, config: Mapping[str, Any]) -> str:
    """16 hex digits that name a teacher: a hash of its parameters and its JSON-able config.

    Examples:
        >>> len(fingerprint({"bias": np.zeros(3)}, {"hidden": [800]}))
        16
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
