"""Bytes that a compiled program reads and writes in a device's memory, by the text of the program.

XLA's own count takes a loop's body once, the whole of an array of which a few rows are gathered, and
what lies on the chip as if it were in memory.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator

from experiments.compiled.hlo import Array, Computation, Instruction, Module, parse

NOTHING = (
    *("parameter", "constant", "iota", "partition-id", "replica-id"),
    *("tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency"),
)
"""Instructions that move nothing, or what may be made where it is used."""

RESHAPES = ("ConcatBitcast", "AssumeGatherIndicesInBound", "AllocateBuffer", "Sharding")
"""Custom calls that move nothing."""

PARTS = ("gather", "dynamic-slice", "slice")
"""Instructions that read only as much of their first operand as they give."""

REPLACES = {"dynamic-update-slice": 1, "scatter": -1}
"""Instructions that replace a part of their first operand, and which operand has the part."""

Size = Callable[..., float]
"""Bytes transferred by one read or write: `(array, most = all of it) -> bytes`."""

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def moved_bytes(text: str, cache: int = 0) -> float:
    """A lower bound of the bytes that a run of the program reads from and writes to memory.

    Loops count with their trip counts; once, if that isn't known. A conditional counts as its cheapest
    branch. Sizes are those of the numbers, without the padding of a layout.

    Args:
        text: HLO, `compiled.as_text()`.
        cache: bytes of a cache that the program doesn't manage: so much of each array may be there.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from experiments.compiled.traffic import moved_bytes
        >>> compiled = jax.jit(jnp.matmul).lower(jnp.ones((2, 3)), jnp.ones((3, 4))).compile()
        >>> moved_bytes(compiled.as_text())  # 6 numbers and 12 are read, 8 written
        104.0
    """
    module = parse(text)
    return _of_computation(
        module, module.computations[module.entry], functools.partial(_size, cache)
    )


def _size(cache: int, array: Array, most: float = math.inf) -> float:
    """Bytes that reading or writing an array transfers, if at most so many of its bytes are used."""
    return 0.0 if array.space else max(min(array.bytes, most) - cache, 0.0)


def _of_computation(module: Module, own: Computation, size: Size) -> float:
    return sum(_of_instruction(module, own, one, size) for one in own.values())


def _of_instruction(module: Module, own: Computation, one: Instruction, size: Size) -> float:
    def inside(name: str) -> float:
        return _of_computation(module, module.computations[name], size)

    if one.kind in NOTHING or (one.kind == "custom-call" and any(x in one.rest for x in RESHAPES)):
        return 0.0
    if one.kind == "while":
        body, condition = one.called("body"), one.called("condition")
        return _trips(one, module.computations[condition]) * inside(body)
    if one.kind in ("call", "async-start"):
        return inside(one.called("to_apply") or one.called("calls"))
    if one.kind == "conditional":
        return min(map(inside, one.branches))
    if one.kind.endswith("-done"):
        return _of_done(module, own, one, size)
    if one.kind.startswith("fusion"):
        read = _read_by_fusion(module, own, one, size)
        return read + (_given(module, one, one.result, size) if one.kind == "fusion" else 0.0)
    operands = [own[name] for name in one.operands]
    if one.kind.endswith("-start"):
        # What is copied is counted where it is done; a collective's operands are read.
        copies = one.kind in ("copy-start", "slice-start")
        return 0.0 if copies else sum(size(x) for y in operands for x in y.result)
    return sum(_of_plain(one, operands, size))


def _of_plain(one: Instruction, operands: list[Instruction], size: Size) -> Iterator[float]:
    """What an instruction reads, and what it writes."""
    arrays = [array for operand in operands for array in operand.result]
    if one.kind in PARTS:
        (result,) = one.result
        yield size(arrays[0], result.bytes)
        yield size(result)
    elif one.kind in REPLACES:
        part = arrays[REPLACES[one.kind]]
        yield size(part)
        yield size(one.result[0], part.bytes)
    else:
        yield from (size(array) for array in [*arrays, *one.result])


def _of_done(module: Module, own: Computation, done: Instruction, size: Size) -> float:
    """The end of what runs beside other work: what it gives; of a copy, also what it is made of."""
    start = own[done.operands[0]]
    if done.kind == "async-done":
        return 0.0  # what ran was counted where it was started
    if start.kind == "fusion-start":
        return _given(module, start, done.result, size)
    written = sum(size(array) for array in done.result)
    if start.kind not in ("copy-start", "slice-start"):
        return written
    (source,) = own[start.operands[0]].result[:1]
    return written + size(source, done.result[0].bytes)


def _read_by_fusion(module: Module, own: Computation, one: Instruction, size: Size) -> float:
    """What a fusion reads of its operands."""
    fused = module.computations[one.called("calls")]
    return sum(
        size(array, _read_of(module, fused, place, array.bytes))
        for place, name in enumerate(one.operands)
        for array in own[name].result
    )


def _given(module: Module, one: Instruction, result: list[Array], size: Size) -> float:
    """What a fusion writes."""
    written = _written_by(module, module.computations[one.called("calls")])
    return sum(size(array, most) for array, most in zip(result, written, strict=True))


def _read_of(module: Module, fused: Computation, place: int, whole: float) -> float:
    """Bytes that a fusion reads at most of its parameter at a place, of so many."""
    (parameter,) = (
        one for one in fused.values() if one.kind == "parameter" and one.arguments == str(place)
    )
    return min(whole, _read_by_users(module, fused, parameter.name, whole))


def _read_by_users(module: Module, fused: Computation, name: str, whole: float) -> float:
    total = 0.0
    for user in fused.values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.kind in PARTS and place == 0:
                total += user.result[0].bytes
            elif user.kind in REPLACES and place == 0:
                continue  # the rest stays where it is
            elif user.kind == "bitcast":
                total += _read_by_users(module, fused, user.name, whole)
            elif user.kind == "fusion":
                inner = module.computations[user.called("calls")]
                total += _read_of(module, inner, place, whole)
            else:
                return whole
    return total


def _roots(computation: Computation) -> list[Instruction]:
    """What a computation gives."""
    (root,) = (one for one in computation.values() if one.is_root)
    return [computation[name] for name in root.operands] if root.kind == "tuple" else [root]


def _written_by(module: Module, fused: Computation) -> list[float]:
    """Bytes that are written at most of each array that a fusion gives."""
    return [most for root in _roots(fused) for most in _written(module, fused, root)]


def _written(module: Module, fused: Computation, root: Instruction) -> list[float]:
    """The same of a root: where it replaces a part, the bytes of the part."""
    if root.kind == "bitcast":
        return _written(module, fused, fused[root.operands[0]])
    if root.kind == "fusion":
        return _written_by(module, module.computations[root.called("calls")])
    if root.kind in REPLACES:
        return [fused[root.operands[REPLACES[root.kind]]].result[0].bytes]
    return [math.inf] * len(root.result)


def _trips(loop: Instruction, condition: Computation) -> int:
    """The trip count of a loop: as XLA says, or the number that its counter is compared with."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    (root,) = _roots(condition)
    if root.kind != "compare" or "direction=LT" not in root.rest:
        return 1
    counter, bound = (condition[name] for name in root.operands)
    counts = counter.kind == "get-tuple-element" and bound.kind == "constant"
    return int(bound.arguments) if counts else 1
