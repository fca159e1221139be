"""Numbers of a step, such as the temperature, that change with the step."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax.batches import take

RAMP = ("from", "to", "steps")
"""The parts of a number that changes with the step, in a straight line and then no more."""

Schedule = Callable[[Array], ArrayLike]
"""A number as a function of the step, int32 `[]`."""


def at_step(
    hyper: Mapping[str, Any],
    step: Array,
    schedules: Mapping[str, Schedule] = types.MappingProxyType({}),
) -> dict[str, Array]:
    """The numbers of a step, each float32 `[]`.

    A ramp {"from": a, "to": b, "steps": n} is a at step 0, b from step n on, and a straight line in
    between.

    Examples:
        >>> ramp = {"from": jnp.float32(8), "to": jnp.float32(2), "steps": jnp.float32(100)}
        >>> print(at_step({"temperature": ramp}, jnp.int32(50))["temperature"])
        5.0
    """

    def value(number: Any) -> Array:
        if not isinstance(number, Mapping):
            return number
        first, last, steps = take(number, RAMP, "a number that changes has", "give all three")
        done = jnp.minimum(step.astype(jnp.float32) / steps, 1.0)
        return first + done * (last - first)

    fixed = {name: value(number) for name, number in hyper.items()}
    return fixed | {
        name: jnp.asarray(schedule(step), jnp.float32) for name, schedule in schedules.items()
    }
