"""Reads the text of a compiled program: XLA's HLO, as `compiled.as_text()` gives it."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[^ ]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT )?%(?P<name>[^ ]+) = (?P<rest>.*)")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_EITHER = re.compile(r"\b(?:true|false)_computation=%([\w.\-]+)")
_SPACE = re.compile(r"S\((\d+)\)")


class Array(NamedTuple):
    """Of an instruction's result. space: the memory that it lies in, 0 for the device's main one."""

    bytes: int
    space: int


class Instruction(NamedTuple):
    """One instruction. result: an array, or the arrays of a tuple. arguments: names of operands; of a
    constant its value, of a parameter its number. rest: what follows, such as "dimensions={0}"."""

    name: str
    kind: str
    result: list[Array]
    arguments: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def called(self, as_what: str) -> str:
        """The computation that it calls as "calls", "to_apply", "condition" or "body"; "" if none."""
        return dict(_CALLED.findall(self.rest)).get(as_what, "")

    @property
    def branches(self) -> list[str]:
        """Of a conditional."""
        listed = _BRANCHES.search(self.rest)
        return re.findall(r"%([\w.\-]+)", listed[1]) if listed else _EITHER.findall(self.rest)


Computation = Mapping[str, Instruction]
"""The instructions of a computation by their names, in order."""


class Module(NamedTuple):
    """A program."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads a program.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from experiments.compiled import hlo
        >>> text = jax.jit(jnp.matmul).lower(jnp.ones((2, 3)), jnp.ones((3, 4))).compile().as_text()
        >>> module = hlo.parse(text)
        >>> (root,) = (one for one in module.computations[module.entry].values() if one.is_root)
        >>> root.result
        [Array(bytes=32, space=0)]
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, own = "", {}
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            own[found["name"]] = _instruction(found["name"], found["rest"], bool(found["root"]))
        elif found := _COMPUTATION.match(line):
            own = computations.setdefault(found["name"], {})
            entry = found["name"] if found["entry"] else entry
    return Module(computations, entry)


def bytes_of(bits: str, dimensions: str) -> int:
    """Of an array by `SHAPE`; no bits are those of a truth value."""
    count = math.prod(int(size) for size in dimensions.split(",") if size)
    return count * max(int(bits or 8) // 8, 1)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    result = [
        Array(bytes_of(bits, dimensions), int(space[1]) if (space := _SPACE.search(layout)) else 0)
        for _, bits, dimensions, layout in SHAPE.findall(text[:end])
    ]
    kind, _, after = text[end:].strip().partition("(")
    end = _closing("(" + after) - 1
    return Instruction(name, kind, result, after[: end - 1], after[end:], is_root)


def _closing(text: str) -> int:
    """Where the bracket ends that a text starts with."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"no end of the bracket in {text[:80]!r}")
