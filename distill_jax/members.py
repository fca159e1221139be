"""Frozen nets that vmapped members share, such as a teacher in the step."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

_SPREAD: contextvars.ContextVar[bool] = contextvars.ContextVar("spread", default=False)


@contextlib.contextmanager
def spread(over_devices: bool) -> Iterator[None]:
    """Within it the members are vmapped; whether they are split over devices."""
    token = _SPREAD.set(over_devices)
    try:
        yield
    finally:
        _SPREAD.reset(token)


def shared(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The same function of parameters and inputs `[B, ...]`; vmapped over inputs alone it is one batch.

    JAX makes one batch `[M * B, ...]` of the inputs of M members to convolve them. If the examples are
    split over devices, those of a device are not next to each other there, and all are sent to all
    devices. Here it is `[B * M, ...]`, cut as the examples are; where members are split over devices
    (`spread`) it is JAX's.
    """
    run = jax.custom_batching.custom_vmap(apply)

    @run.def_vmap
    def vmapped(size: int, batched: Any, params: Any, inputs: Any) -> Any:
        own_params, own_inputs = batched
        of_params, of_inputs = jax.tree.leaves(own_params), jax.tree.leaves(own_inputs)
        if any(of_params) or not all(of_inputs) or _SPREAD.get():
            axes = jax.tree.map(lambda own: 0 if own else None, (own_params, own_inputs))
            found = jax.vmap(apply, axes, spmd_axis_name="member" if _SPREAD.get() else None)(
                params, inputs
            )
        else:
            found = apply(params, jax.tree.map(_examples_first, inputs))
            found = jax.tree.map(lambda x: _members_first(x, size), found)
        return found, jax.tree.map(lambda _: True, found)

    return run


def _examples_first(x: Any) -> Any:
    """`[M, B, ...]` as `[B * M, ...]`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _members_first(x: Any, size: int) -> Any:
    """`[B * M, ...]` as `[M, B, ...]`."""
    return jnp.moveaxis(x.reshape(-1, size, *x.shape[1:]), 1, 0)
