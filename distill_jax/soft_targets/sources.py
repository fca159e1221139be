"""What soft targets are made of: a teacher's logits, as arrays or from a function, and more of it."""

import hashlib
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from distill_jax.errors import UserError
from distill_jax.soft_targets.ensemble import Mean, check_weights

_SHORT = 64  # numbers of an array that a store's meta has itself

Teacher = Callable[[np.ndarray], ArrayLike]
"""Rows int64 `[B]` -> logits (or probabilities) `[B, C]`, or logits of M members `[M, B, C]`, or of V
views `[B, V, C]`."""


class Source(NamedTuple):
    """What a store is made of, besides what its meta says.

    ask: the teacher. num_classes: C, the teacher's. weights: float `[M]` of members, or `[N, M]`.
    class_map: int32 `[S]` (`class_maps`).
    """

    ask: Teacher
    num_classes: int
    weights: np.ndarray | None = None
    class_map: np.ndarray | None = None


class Views(Protocol):
    """A scheme of augmented views (`data.augment.Views`): its name, their number, and their field."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def num_views(self) -> int: ...  # noqa: D102

    @property
    def field(self) -> str: ...  # noqa: D102


def describe_views(views: Views | None) -> dict[str, Any] | None:
    """What a store's meta says of its views."""
    return None if views is None else {"name": views.name, "count": views.num_views}


def read(
    source: Any, size: int, mean: Mean | None, num_classes: int | None, *, views: Views | None
) -> Source:
    """What is asked for rows, and C."""
    if callable(source):
        if num_classes is None:
            raise UserError("the teacher is a function: give num_classes too")
        return Source(source, number("num_classes", num_classes))
    single = hasattr(source, "shape")  # an array of NumPy, JAX or PyTorch
    if not single and not isinstance(source, list | tuple):
        raise UserError(
            f"logits are of type {type(source).__name__}; expected arrays or a function"
        )
    members = [np.asarray(logits) for logits in ([source] if single else source)]
    kinds = {str(member.dtype) for member in members if not _is_real(member.dtype)}
    if kinds:
        raise UserError(f"logits are of {', '.join(sorted(kinds))}; expected real numbers")
    shapes = {member.shape for member in members}
    shape = next(iter(shapes), ())
    rows = (size,) if views is None else (size, views.num_views)
    if len(shapes) != 1 or len(shape) != len(rows) + 1 or shape[:-1] != rows:
        raise UserError(
            f"logits are {', '.join(map(str, sorted(shapes))) or 'none'} for {size} digests; "
            f"expected arrays ({', '.join(map(str, rows))}, C), one of each teacher"
        )
    if num_classes not in (None, shape[-1]):
        raise UserError(f"num_classes is {num_classes}, but the logits have {shape[-1]}")
    if (mean is None) != (len(members) == 1):
        raise UserError(
            f"mean is {mean!r} for {len(members)} arrays of logits; expected 'arithmetic' or "
            "'geometric' for an ensemble, and None for one teacher"
        )

    def ask(rows: np.ndarray) -> np.ndarray:
        some = np.stack([member[rows] for member in members]).astype(np.float32)
        return some[0] if mean is None else some

    return Source(ask, shape[-1])


def read_weights(weights: ArrayLike, source: Any, mean: Mean | None, size: int) -> np.ndarray:
    """Members' weights float32 `[M]` or `[N, M]`."""
    if mean is None:
        raise UserError("weights are those of an ensemble's members: give its mean too")
    members = (np.shape(weights) or (0,))[-1] if callable(source) else len(source)
    return np.asarray(check_weights(weights, members, (size,)), np.float32)


def noted(array: np.ndarray | None) -> Any:
    """A short array as its numbers, a longer one by its hash."""
    if array is None or array.size <= _SHORT:
        return None if array is None else array.tolist()
    return f"{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def _is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def digest(ask: Teacher, rows: range) -> str:
    """Names the logits of some rows."""
    digest = hashlib.sha256()
    for first in range(rows.start, rows.stop, 1024):  # as many as fit in the memory
        part = np.asarray(ask(np.arange(first, min(first + 1024, rows.stop))))
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def number(name: str, value: Any, least: int = 0) -> int:
    """A whole number of Python, of one of any library."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise UserError(f"{name} is {value!r}; expected a whole number") from error
    if number < least:
        raise UserError(f"{name} is {number}; expected at least {least}")
    return number
