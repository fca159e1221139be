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
        own_params, own_inputs = map(jax.tree.leaves, batched)
        over_devices = _SPREAD.get()
        if any(own_params) or not all(own_inputs) or over_devices:
            axes = jax.tree.map(lambda own: 0 if own else None, tuple(batched))
            axis_name = "member" if over_devices else None
            found = jax.vmap(apply, axes, spmd_axis_name=axis_name)(params, inputs)
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
