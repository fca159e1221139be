"""What the numbers and words that users set may be: one table of names, and the check of it.

Values are checked where they enter, before anything is computed. What JAX traces is not known then, and
passes.

    >>> from distill_jax import ranges
    >>> ranges.check(temperature=4.0, hard_weight=0.1)
    >>> ranges.check(temperature=-4)
    Traceback (most recent call last):
    ...
    distill_jax.errors.UserError: temperature is -4; allowed: above 0, finite
"""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import UserError


class Allowed(NamedTuple):
    """What a value may be. words: end the message "X is 3; allowed: ...". accepts: of plain values."""

    words: str
    accepts: Callable[[Any], bool]


def number(words: str, accepts: Callable[[float], bool]) -> Allowed:
    """A finite number, int or float, for which a condition holds; True and False are none."""

    def holds(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and accepts(value)

    return Allowed(f"{words}, finite", holds)


def any_number() -> Allowed:
    """A finite number."""
    return Allowed("a finite number", number("", lambda value: True).accepts)


def above(low: float) -> Allowed:
    """A finite number above `low`."""
    return number(f"above {low:g}", lambda value: value > low)


def at_least(low: float) -> Allowed:
    """A finite number that is `low` or more."""
    return number(f"{low:g} or more", lambda value: value >= low)


def between(low: float, high: float) -> Allowed:
    """A number from `low` to `high`, both included."""
    return _bounded(f"{low:g} to {high:g}", lambda value: low <= value <= high)


def below(high: float) -> Allowed:
    """A number from 0 to less than `high`."""
    return _bounded(f"0 or more, and less than {high:g}", lambda value: 0 <= value < high)


def _bounded(words: str, accepts: Callable[[float], bool]) -> Allowed:
    return Allowed(words, number(words, accepts).accepts)


def share() -> Allowed:
    """A number from 0 to 1."""
    return between(0, 1)


def count(low: int = 1, high: int | None = None) -> Allowed:
    """A whole number that is `low` or more, and `high` or less if it is given; 2.0 is none."""
    words = f"a whole number, {low} " + ("or more" if high is None else f"to {high}")
    limit = math.inf if high is None else high
    return _bounded(words, lambda value: isinstance(value, int) and low <= value <= limit)


def one_of(*values: Any) -> Allowed:
    """One of some values, of the same type."""
    words = ", ".join(map(repr, values[:-1])) + " or " * (len(values) > 1) + repr(values[-1])
    return Allowed(words, lambda value: any(type(value) is type(v) and value == v for v in values))


def either(first: Allowed, second: Allowed) -> Allowed:
    """What one of the two allows."""
    words = f"{first.words}; or {second.words}"
    return Allowed(words, lambda value: first.accepts(value) or second.accepts(value))


def flag() -> Allowed:
    """True or False."""
    return one_of(True, False)


def text(may_be_empty: bool = False) -> Allowed:
    """A string."""
    words = "a text" if may_be_empty else "a text that is not empty"
    return Allowed(words, lambda value: isinstance(value, str) and (may_be_empty or value != ""))


def several(each: Allowed, least: int = 1, distinct: bool = False) -> Allowed:
    """A tuple or list of at least so many values.

    If they must be distinct, numbers must differ in their first six digits: files are named by these.
    """
    words = (
        f"{least} or more values" + (", all different" if distinct else "") + f", each {each.words}"
    )

    def holds(value: Any) -> bool:
        if not isinstance(value, tuple | list) or len(value) < least:
            return False
        known = all(map(each.accepts, value))
        names = [f"{v:g}" if isinstance(v, float) else str(v) for v in value] if known else []
        return known and (not distinct or len(set(names)) == len(names))

    return Allowed(words, holds)


_DROPOUT = below(1)

TABLE: dict[str, Allowed] = {
    # Objectives.
    "temperature": above(0),
    "teacher_temperature": above(0),
    "hard_weight": share(),
    "teacher_share": share(),
    "target_weight": at_least(0),
    "other_weight": at_least(0),
    "inter_weight": at_least(0),
    "intra_weight": at_least(0),
    # Optimizers.
    "learning_rate": above(0),
    "momentum": below(1),
    "max_norm": at_least(0),
    "warmup_steps": count(0),
    # Training.
    "epochs": count(),
    "batch_size": count(),
    "micro_batches": count(),
    "report_every": count(),
    "save_every": count(),
    "fused_logits": count(0),
    # Nets.
    "hidden": several(count(), least=0),
    "input_dropout": _DROPOUT,
    "hidden_dropout": _DROPOUT,
    "num_classes": count(),
    # Data.
    "jitter": count(0),
    # Soft targets.
    "k": count(),
    "mean": one_of("arithmetic", "geometric"),
    "encoding": one_of("dense", "top_k", "sampled"),
}
"""Names of arguments and of fields of configs, and what they may be."""


def check(**values: Any) -> None:
    """Checks values by the names that they have in `TABLE`.

    Args:
        values: plain ones, NumPy's, or arrays, of which each entry is checked.

    Raises:
        UserError: for the first that isn't allowed, with its name, value and what is allowed.
    """
    for name, value in values.items():
        check_value(name, value, TABLE[name])


def check_plain(**values: Any) -> None:
    """`check` of the plain numbers alone: to read an array would wait for the device."""
    check(**{name: value for name, value in values.items() if isinstance(value, int | float)})


def check_value(name: str, value: Any, allowed: Allowed) -> None:
    """Raises a UserError that names the value if it isn't allowed; what is traced passes."""
    for each in _plain(value):
        if not allowed.accepts(each):
            raise UserError(f"{name} is {each!r}; allowed: {allowed.words}")


def _plain(value: Any) -> Iterable[Any]:
    """A value as plain Python ones: the entries of an array, nothing if it is traced."""
    if isinstance(value, tuple | list):
        return [tuple(plain for each in value for plain in _plain(each))]
    jax: Any = sys.modules.get("jax")  # not imported for this: the check of a config needs no JAX
    if not isinstance(value, np.ndarray | np.generic) and not (
        jax and isinstance(value, jax.Array)
    ):
        return [value]
    try:
        array = np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return []
    # JAX's own dtypes, such as bfloat16, have no plain values.
    return (array.astype(np.float32) if array.dtype.kind == "V" else array).ravel().tolist()
