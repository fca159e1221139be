"""The fields of a batch, or of a set of examples: their leading axis, weights, labels, inputs."""

from collections.abc import Callable, Sequence
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


def rows_of(field: Any, rows: Array) -> Any:
    """The rows `[B]` of a field `[N, ...]`: `[B, ...]`; or one of them, `[...]`.

    Images of bytes are taken as rows of a matrix: of their last axes a TPU makes tiles of 128 lanes, and
    it would copy many images of 32x32 to four times their size before it takes any. Arrays of wider
    numbers, such as the logits of some views, it takes as they lie.

    Examples:
        >>> import numpy as np
        >>> from distill_jax import batches
        >>> images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
        >>> batches.rows_of(images, np.array([2, 0])).tolist()
        [[[8, 9], [10, 11]], [[0, 1], [2, 3]]]
    """
    if not (_are_images(field) and np.ndim(rows)):
        return field[rows]
    return field.reshape(len(field), -1)[rows].reshape(*rows.shape, *field.shape[1:])


def as_matrices(fields: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A tree of fields whose images of bytes are the rows of matrices, and what makes them images again.

    For a loop that takes rows. What is made a matrix inside of it, a TPU copies in each round; what
    makes images again belongs there, where it and `rows_of` cancel out.

    Examples:
        >>> import numpy as np
        >>> from distill_jax import batches
        >>> matrices, images = batches.as_matrices({"inputs": np.zeros((3, 2, 2), np.uint8)})
        >>> matrices["inputs"].shape, images(matrices)["inputs"].shape
        ((3, 4), (3, 2, 2))
    """
    leaves, tree = jax.tree.flatten(fields)
    shaped = [leaf.shape for leaf in leaves]
    flat = [leaf.reshape(len(leaf), -1) if _are_images(leaf) else leaf for leaf in leaves]

    def images(flat: Any) -> Any:
        found = zip(jax.tree.leaves(flat), shaped, strict=True)
        return jax.tree.unflatten(tree, [leaf.reshape(shape) for leaf, shape in found])

    return jax.tree.unflatten(tree, flat), images


def _are_images(field: Any) -> bool:
    return field.ndim > 2 and field.dtype.itemsize == 1


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


def inputs_of(batch: Any) -> Any:
    """The batch's "inputs", an array or a tree of arrays `[B, ...]`; a UserError if there are none."""
    (inputs,) = take(batch, ("inputs",), "the batch has", "the model is applied to that field")
    count_rows(inputs)
    return inputs


def known_labels(batch: Any) -> Array | None:
    """The batch's "label", -1 where "label_known" is false; None if it has no labels.

    Examples:
        >>> batch = {"label": jnp.array([2, 0, -1]), "label_known": jnp.array([True, False, True])}
        >>> print(known_labels(batch), known_labels({}))
        [ 2 -1 -1] None
    """
    labels, known = batch.get("label"), batch.get("label_known")
    shapes.check(label=(labels, "int? ..."), label_known=(known, "bool? ..."))
    if labels is None or known is None:
        return labels
    return jnp.where(known, labels.astype(jnp.int32), -1)


def labels_of(batch: Any) -> Array:
    """`known_labels` of a batch that must have labels; a UserError if it has none."""
    take(batch, ("label",), "the batch has", "this loss or evaluation reads it")
    labels = known_labels(batch)
    shapes.check(label=(labels, "int ..."))
    assert labels is not None
    return labels


def take(fields: Any, names: Sequence[str], what: str, how: str) -> tuple[Any, ...]:
    """Some of the fields of a batch, of `hyper` or of the constants.

    Args:
        fields: by name; None: there are none.
        names: of those that are wanted.
        what: begins the message if one is missing: "the batch has".
        how: ends it: what to do.

    Raises:
        UserError: if one is missing.
    """
    missing = [name for name in names if name not in (fields or {})]
    if missing:
        raise UserError(f"{what} no {', '.join(missing)}, only {sorted(fields or {})}: {how}")
    return tuple(fields[name] for name in names)
