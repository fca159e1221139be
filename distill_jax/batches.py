"""What the fields of a batch, or of a set of examples, share: their leading axis, and weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import shapes
from distill_jax.errors import UserError


def check_rows(fields: Any, size: int, what: str) -> None:
    """Raises a UserError naming a field that isn't `[size, ...]`, so that it has no rows to take or cut.

    An index beyond an array's end is clamped in compiled code: the rows of another field would be wrong.

    Args:
        fields: a tree of arrays, or of what is traced.
        size: of the leading axis.
        what: begins the message, and is followed by the size and "examples".

    Examples:
        >>> import numpy as np
        >>> from distill_jax import batches
        >>> batches.check_rows({"label": np.zeros(4), "rate": 0.5}, 4, "a batch of")
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: a batch of 4 examples, but 'rate' is []; expected [4, ...]: ...
    """
    for path, field in jax.tree.leaves_with_path(fields):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the field"
        if np.shape(field)[:1] != (size,) or 0 in np.shape(field):
            raise UserError(
                f"{what} {size} examples, but {name!r} is {list(np.shape(field))}; expected "
                f"[{size}, ...]: what isn't of examples belongs in the constants"
            )
        shapes.check(**{name: (field, "any *")})


def count_rows(inputs: Any, name: str = "inputs") -> int:
    """The examples N in an array `[N, ...]`, or in all arrays of a tree of dicts and tuples.

    Raises:
        UserError: for what is no array, or has no examples, or others than the first.

    Examples:
        >>> import numpy as np
        >>> from distill_jax import batches
        >>> batches.count_rows({"tokens": np.zeros((4, 7)), "mask": np.ones((4, 7))})
        4
    """
    leaves = jax.tree.leaves_with_path(inputs, is_leaf=lambda x: x is None or isinstance(x, list))
    names = [jax.tree_util.keystr((*path,), simple=True, separator="/") for path, _ in leaves]
    arrays = {
        f"{name}/{own}" if own else name: (leaf, "any N *")
        for own, (_, leaf) in zip(names, leaves, strict=True)
    }
    if not arrays:
        raise UserError(f"{name} is {shapes.describe(inputs)} without any array in it")
    return shapes.check(**arrays)["N"]


def weights(batch: Any) -> Array | None:
    """The batch's "weight" float32 `[B]` or `[B, T]`; None if all weigh the same.

    A weight below 0 is a mistake, which becomes NaN: compiled code can't raise an error.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import batches
        >>> print(batches.weights({"weight": jnp.array([1, 0, -1])}), batches.weights({}))
        [ 1. 0. nan] None
    """
    found = batch.get("weight")
    shapes.check(weight=(found, "any? B *"))
    if found is None:
        return None
    found = jnp.asarray(found).astype(jnp.float32)
    return jnp.where(found >= 0, found, jnp.nan)


def spread(weight: Array, values: Array) -> Array:
    """The weights of values `[B, ...]`: those of the leading axes, for all that follows.

    Raises:
        UserError: if the values haven't the weights' axes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import batches
        >>> print(batches.spread(jnp.array([1.0, 0.5]), jnp.zeros((2, 3))))
        [[1. 1. 1. ]
         [0.5 0.5 0.5]]
    """
    if values.shape[: weight.ndim] != weight.shape:
        raise UserError(
            f"weight is {list(weight.shape)}, but there are values {list(values.shape)} to weigh; "
            "expected [B], or [B, T] of sequences"
        )
    shape = weight.shape + (1,) * (values.ndim - weight.ndim)
    return jnp.broadcast_to(weight.reshape(shape), values.shape)
