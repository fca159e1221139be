"""Over which axes of a mesh each array of a training state is split: by names and shapes alone.

`sharding.state_shardings` says why.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from distill_jax import layers
from distill_jax.errors import UserError

LARGE = 2**16  # values of a weight: the update of fewer takes less time than to send them

Split = tuple[str | None, ...]
"""The mesh's axis that each axis of an array is split over, as a PartitionSpec has them."""


def depths_of(paths: Iterable[tuple[Any, ...]]) -> dict[str, int]:
    """How far each layer that can be split is from the end, by its name; the output layer is at 0."""
    hidden = {layer for layer, _ in map(_layer_of, paths) if layer.startswith("hidden_")}
    return {layers.OUTPUT: 0, **{f"hidden_{i}": len(hidden) - i for i in range(len(hidden))}}


def of_weight(
    path: tuple[Any, ...], shape: tuple[int, ...], depths: Mapping[str, int], parts: int
) -> Split:
    """The split of a kernel `[..., inputs, units]` or bias `[..., units]` over "model"; else none.

    Args:
        path: of the leaf in the state.
        shape: of the leaf; what stands before the last two axes, or the last, is not split here.
        depths: from `depths_of`.
        parts: the size of "model".

    Raises:
        UserError: for a hidden layer that "model" doesn't divide.
    """
    layer, weights = _layer_of(path)
    if layer not in depths or weights not in ("kernel", "bias"):
        return ()
    by_units = depths[layer] % 2 == 0
    if weights == "bias" and not by_units:
        return ()
    size = shape[-1] if by_units else shape[-2]
    if size % parts:
        if layer == layers.OUTPUT:
            return ()
        raise UserError(
            f"{layer} has {size} {'units' if by_units else 'inputs'}, which don't divide over {parts} "
            "model devices: choose other hidden sizes or another mesh.model"
        )
    if weights == "bias":
        return ("model",)
    return (None, "model") if by_units else ("model", None)


def of_update(split: Split, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Split:
    """The split of what an optimizer keeps of a weight: over "data" too, by units where it can be.

    A limit on the incoming weights needs all of a unit's in one place.

    Args:
        split: of the weight.
        shape: of the weight, without an axis of members.
        sizes: of the mesh's axes.
    """
    parts = sizes["data"]
    if parts == 1 or math.prod(shape) < LARGE:
        return split
    split = (*split, *[None] * (len(shape) - len(split)))
    for axis, size in reversed(list(enumerate(shape))):
        over = split[axis]
        if (over is None or sizes[over] == 1) and size % parts == 0:
            return (*split[:axis], "data", *split[axis + 1 :])
    return split


def _layer_of(path: tuple[Any, ...]) -> tuple[str, str]:
    """The last two keys on the way to a leaf: ("hidden_0", "kernel") of a layer's."""
    names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    return (names[-2], names[-1]) if len(names) > 1 else ("", "")
