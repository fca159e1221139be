"""The platform that programs are made for: that of JAX's devices, or another one ahead of time."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def current() -> str:
    """ "cpu", "gpu" or "tpu": programs differ in what is fast there."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within it, `current` is another platform: for programs that are compiled and not run."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)
