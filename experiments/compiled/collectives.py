"""The communication between devices, read off a compiled program."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from experiments.compiled.hlo import SHAPE, bytes_of

KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
INSTRUCTION = re.compile(rf"= (?P<result>.*?) (?P<kind>{KINDS})(?P<start>-start)?\((?P<rest>.*)")
LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\]"
    r"(?:, device_ids=\(\[(?P<order>[\d,]+)\](?:T\((?P<axes>[\d,]+)\))?\))? \{(?P<names>[^}:]*)\}"
)


class Collective(NamedTuple):
    """One instruction. kind: "all-reduce" and so on. bytes: of its result on one device. axes: those of
    the mesh that it crosses."""

    kind: str
    bytes: int
    axes: tuple[str, ...]


def collectives(compiled_text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a program, in its order; one in a loop's body once.

    Args:
        compiled_text: HLO after XLA has split the work: `jitted.lower(...).compile().as_text()`.
        mesh: the one that the program was compiled for.

    Raises:
        ValueError: for groups of devices in a form that isn't known here.
    """
    matches = (INSTRUCTION.search(line) for line in compiled_text.splitlines())
    return [
        Collective(
            match["kind"],
            _result_bytes(match["result"], match["kind"], match["start"] is not None),
            _crossed(_groups(match["rest"], mesh), mesh),
        )
        for match in matches
        if match
    ]


def _result_bytes(result: str, kind: str, starts: bool) -> int:
    sizes = [bytes_of(bits, dimensions) for _, bits, dimensions, _ in SHAPE.findall(result)]
    if starts and kind != "all-reduce":  # operands come first, then as many results
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _groups(attributes: str, mesh: Mesh) -> Iterator[np.ndarray]:
    """The devices of each group, as places in the mesh; XLA writes them in one of three forms."""
    if listed := LISTED.search(attributes):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
        return map(np.array, groups or [list(range(mesh.size))])
    if counted := COUNTED.search(attributes):
        return iter(_ordered(counted[2], counted[3]).reshape(_numbers(counted[1])))
    if named := NAMED.search(attributes):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named["sizes"]))
        sizes = [int(size) for size in axes.values()]
        inside = [list(axes).index(name) for name in re.findall(r"'(\w+)'", named["names"])]
        places = _ordered(named["order"] or str(math.prod(sizes)), named["axes"]).reshape(sizes)
        last = range(-len(inside), 0)
        return iter(np.moveaxis(places, inside, last).reshape(-1, *[sizes[i] for i in inside]))
    raise ValueError(f"no groups of devices in a known form: {attributes}")


def _ordered(shape: str, transposed: str | None) -> np.ndarray:
    """Counts up in `shape`, with its axes transposed if it says so; flat."""
    sizes = _numbers(shape)
    places = np.arange(math.prod(sizes)).reshape(sizes)
    return (places.transpose(_numbers(transposed)) if transposed else places).ravel()


def _crossed(groups: Iterator[np.ndarray], mesh: Mesh) -> tuple[str, ...]:
    shape = mesh.devices.shape
    places = [np.array(np.unravel_index(group.ravel(), shape)) for group in groups]
    varies = np.any([np.ptp(place, axis=1) > 0 for place in places], axis=0)
    return tuple(name for name, crosses in zip(mesh.axis_names, varies, strict=True) if crosses)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
