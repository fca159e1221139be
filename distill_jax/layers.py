"""Layers of parameters, found by name at any depth: in nested dicts, or the state of an NNX module."""

from typing import Any

import jax
from jax import Array

from distill_jax.errors import UserError

OUTPUT = "output"
"""The name of the softmax layer in every model of `distill_jax.models`."""


def names(path: tuple[Any, ...]) -> list[str]:
    """The names on the way to a leaf, as `jax.tree.leaves_with_path` gives it.

    Examples:
        >>> import jax
        >>> [(path, _)] = jax.tree.leaves_with_path({"net": {"output": {"bias": 0.0}}})
        >>> names(path)
        ['net', 'output', 'bias']
    """
    keys = [[getattr(entry, kind, None) for kind in ("key", "name", "idx")] for entry in path]
    return [next((str(key) for key in some if key is not None), "") for some in keys]


def check(params: Any, layer: str) -> None:
    """Raises a UserError if no layer of the parameters has that name."""
    paths = [names(path) for path, _ in jax.tree.leaves_with_path(params)]
    if not any(layer in path for path in paths):
        found = sorted({name for path in paths for name in path[:-1]})
        raise UserError(
            f"no layer of the parameters is named {layer!r}, only {', '.join(found) or 'none at all'}: "
            "name the softmax layer by the argument `output`"
        )


def find(params: Any, layer: str) -> dict[str, Array]:
    """The arrays of one layer by their names, such as {"kernel" `[D, C]`, "bias" `[C]`}.

    Raises:
        UserError: if there is no such layer, or several.

    Examples:
        >>> find({"net": {"output": {"bias": 0.0}}}, "output")
        {'bias': 0.0}
    """
    check(params, layer)
    found: dict[tuple[str, ...], dict[str, Array]] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        way = names(path)
        if layer in way[:-1]:
            end = way.index(layer) + 1
            found.setdefault(tuple(way[:end]), {})[way[end]] = leaf
    if len(found) != 1:
        places = ", ".join(sorted("/".join(place) for place in found))
        raise UserError(f"{len(found)} layers of the parameters are named {layer!r}: {places}")
    return next(iter(found.values()))
