"""What a compiled program takes: memory, operations, communication, and no less time than so much."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks.scaling_plan import ring_bytes
from experiments.compiled.collectives import Collective, collectives
from experiments.compiled.targets import Chip
from experiments.compiled.traffic import moved_bytes


class Figures(NamedTuple):
    """A compiled program's figures; of one device, and those of time and operations of one step.

    A program without steps, such as one that counts errors, is one step of so many rounds.
    parameters: of all members. arguments, temporary, output: bytes. flops: of matrix products and
    convolutions. moved: bytes read from and written to memory, at least (`traffic`). sent: by kind, axis
    and number, of one round; sent_bytes: in all, in rings.
    compute, memory, links: seconds, none shorter by the chip's figures; None where these aren't known.
    """

    parameters: int
    arguments: int
    temporary: int
    output: int
    flops: float
    moved: float
    sent: list[tuple[str, str, int, int]]
    sent_bytes: float
    compute: float | None
    memory: float | None
    links: float | None

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return self.arguments + self.temporary + self.output

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds, none shorter, by what takes them; without those that aren't known, or 0."""
        every = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return {name: seconds for name, seconds in every.items() if seconds}


def measure(
    traced: jax.stages.Traced,
    compiled: Any,
    mesh: Any,
    chip: Chip,
    *,
    steps: int,
    parameters: int,
    devices: int,
    waiting: int = 0,
) -> Figures:
    """The figures of a program of so many steps, of which so many devices share the work.

    Bytes that wait on each device for the next program count as arguments.
    """
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    flops = count_flops(traced.jaxpr.jaxpr) / steps / devices
    moved = moved_bytes(text, chip.cache) / steps
    found = collectives(text, mesh)
    sent = sent_bytes(found, mesh)
    known = not math.isnan(chip.flops)
    return Figures(
        parameters,
        memory.argument_size_in_bytes + waiting,
        memory.temp_size_in_bytes,
        # What is donated is counted as an argument already.
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops,
        moved,
        _by_kind(found),
        sent,
        flops / chip.flops if known else None,
        moved / chip.bandwidth if known else None,
        sent / chip.links if known else None,
    )


def sent_bytes(found: list[Collective], mesh: Any) -> float:
    """Bytes that a device sends for some collectives, in rings."""
    return sum(ring_bytes(c.kind, c.bytes, math.prod(mesh.shape[a] for a in c.axes)) for c in found)


def _by_kind(found: list[Collective]) -> list[tuple[str, str, int, int]]:
    """Kind, axes, how many, and bytes in all."""
    groups: dict[tuple[str, str], list[int]] = {}
    for one in found:
        groups.setdefault((one.kind, " x ".join(one.axes)), []).append(one.bytes)
    return [(*key, len(sizes), sum(sizes)) for key, sizes in sorted(groups.items())]


def count_flops(jaxpr: Any) -> float:
    """Floating point operations of matrix products and convolutions; of a loop, in all its rounds.

    Those of a `while` loop, whose rounds are not known, are counted once.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from experiments.compiled.program import count_flops
        >>> count_flops(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 4))).jaxpr)
        48.0
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            total += _convolution_flops(equation)
        rounds = params["length"] if name == "scan" else 1
        total += rounds * sum(count_flops(inner) for inner in _inside(params))
    return total


def _convolution_flops(equation: Any) -> float:
    """Of a convolution; zeros of padding, and those in the gradient of a strided one, don't count."""
    params, (lhs, rhs) = equation.params, (x.aval.shape for x in equation.invars)
    where, result = params["dimension_numbers"], equation.outvars[0].aval.shape
    total = 2.0 * math.prod(result[i] for i in where.out_spec[:2]) * rhs[where.rhs_spec[1]]
    for axis, (low, _) in enumerate(params["padding"]):
        inputs, taps, outputs = (
            shape[spec[2 + axis]]
            for shape, spec in (
                (lhs, where.lhs_spec),
                (rhs, where.rhs_spec),
                (result, where.out_spec),
            )
        )
        starts = np.arange(outputs)[:, None] * params["window_strides"][axis] - low
        places = starts + np.arange(taps) * params["rhs_dilation"][axis]
        apart = params["lhs_dilation"][axis]
        inside = (places >= 0) & (places <= (inputs - 1) * apart)
        total *= np.count_nonzero(inside & (places % apart == 0))
    return total


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    """The programs within an equation."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner
