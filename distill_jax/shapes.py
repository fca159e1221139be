"""Whether arrays that are handed to a public function fit each other, said in a short notation.

    shapes.check(logits=(logits, "float ... C"), labels=(labels, "int ..."))

A kind of dtype comes first (float, int, bool, number: float or int, any; with a "?" where None will do),
then the dimensions. A number is that size, a name is one size of at least 1 wherever it stands (with a
"?", of at least 0), "..." are leading dimensions, the same for all arrays that have them, "k|1" is the
size k or 1, and "*" at the end is whatever dimensions follow.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.errors import UserError

_KINDS: Mapping[str, tuple[Any, ...]] = {
    "float": (jnp.floating,),
    "int": (jnp.integer,),
    "bool": (jnp.bool_,),
    "number": (jnp.floating, jnp.integer),
    "any": (jnp.floating, jnp.integer, jnp.bool_, jax.dtypes.extended),  # keys too
}

Sizes = dict[str, Any]
"""What the names stand for: a size each, and for "..." a tuple."""


def check(**arrays: tuple[Any, str]) -> Sizes:
    """Raises a UserError for the first array that doesn't fit.

    Shapes and dtypes alone are read, so it costs a compiled program nothing.

    Args:
        arrays: by name, each with its notation.

    Returns:
        the sizes by the names of the dimensions.

    Examples:
        >>> import numpy as np
        >>> from distill_jax import shapes
        >>> logits, labels = np.zeros((4, 10), np.float32), np.zeros(5, np.int32)
        >>> shapes.check(logits=(logits, "float ... C"))
        {'...': (4,), 'C': 10}
        >>> shapes.check(logits=(logits, "float ... C"), labels=(labels, "int ..."))
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: labels is int32 (5,); expected int ..., where ... is (4,), C is 10
    """
    sizes: Sizes = {}
    for name, (array, notation) in arrays.items():
        kind, *dimensions = notation.split()
        if array is None and kind.endswith("?"):
            continue
        if not _is_kind(array, kind.strip("?")) or not _fits(tuple(array.shape), dimensions, sizes):
            known = ", ".join(f"{dimension} is {size}" for dimension, size in sizes.items())
            raise UserError(
                f"{name} is {describe(array)}; expected {notation}{known and f', where {known}'}"
            )
    return sizes


def check_fields(fields: Any, what: str, **notations: str) -> Sizes:
    """`check` of the arrays in a dict by their names; one that is not there is a UserError too.

    Args:
        fields: such as a batch.
        what: the dict's name in messages, a singular.
        notations: of the arrays that it must have.

    Examples:
        >>> import numpy as np
        >>> from distill_jax import shapes
        >>> shapes.check_fields({"id": np.arange(3)}, "the batch", id="int N")
        {'N': 3}
    """
    if not isinstance(fields, Mapping):
        raise UserError(f"{what} must be arrays by name, not of type {type(fields).__name__}")
    missing = [name for name in notations if name not in fields]
    if missing:
        raise UserError(
            f"{what} lacks {', '.join(missing)}; there are {', '.join(map(str, fields)) or 'none'}"
        )
    return check(**{name: (fields[name], how) for name, how in notations.items()})


def describe(array: Any) -> str:
    """An array's dtype and shape, or the type of what is no array."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return f"of type {type(array).__name__}"
    return f"{array.dtype} {tuple(array.shape)}"


def _is_kind(array: Any, kind: str) -> bool:
    dtype = getattr(array, "dtype", None)
    if dtype is None or not hasattr(array, "shape"):
        return False
    return any(jnp.issubdtype(dtype, each) for each in _KINDS[kind])


def _fits(shape: tuple[int, ...], dimensions: list[str], sizes: Sizes) -> bool:
    """Whether a shape has these dimensions; notes the sizes of new names."""
    if dimensions[-1:] == ["*"]:
        dimensions = dimensions[:-1]
        if 0 in shape[len(dimensions) :]:
            return False
        shape = shape[: len(dimensions)]
    own = [dimension for dimension in dimensions if dimension != "..."]
    leading = len(shape) - len(own)
    if leading < 0 or (leading > 0 and len(own) == len(dimensions)):
        return False
    fits = (
        len(own) == len(dimensions) or sizes.setdefault("...", shape[:leading]) == shape[:leading]
    )
    for dimension, size in zip(own, shape[leading:], strict=True):
        name, _, other = dimension.partition("|")
        if str(size) == other:
            continue
        expected = int(name) if name.isdigit() else sizes.setdefault(name.strip("?"), size)
        fits &= size == expected and (size > 0 or name.isdigit() or name.endswith("?"))
    return fits
