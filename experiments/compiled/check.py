"""Compiles a study's programs for machines that aren't there, and says what they take."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from distill_jax import ahead, models, sharding
from distill_jax.errors import UserError
from experiments.common import programs
from experiments.common.programs import Pass, Passes, Programs, Training
from experiments.common.training import make_recipe
from experiments.compiled.program import Figures, measure
from experiments.compiled.targets import Target, devices

LOG = Path(tempfile.gettempdir()) / "distill_jax_compilers.log"
"""What the compilers print on stderr."""


class _Task(NamedTuple):
    """A program to compile: what it is and of which names; and how many devices share its work.

    waiting: bytes on each device beside it.
    """

    what: str
    names: str
    traced: Any
    steps: int
    parameters: int
    devices: int
    waiting: int = 0


def check(
    config: ConfigDict,
    listed: Programs,
    passes: Passes,
    targets: Sequence[Target],
    only: Sequence[str] = (),
    *,
    evaluation: bool = True,
) -> list[dict[str, Any]]:
    """Compiles all distinct programs for each target, and prints a line for each.

    Args:
        config: of the study.
        listed, passes: the study's trainings, and the passes that make soft targets.
        targets: the machines.
        only: names of stages; empty for all.
        evaluation: whether to compile what counts errors, too.

    Returns:
        A record of each program on each target: what is printed, as numbers. "fits" is None for one that
        can't be compiled.

    Raises:
        UserError: for a mesh that doesn't fit a target, or batches that don't fit the mesh.
    """
    trainings = programs.distinct(each for each in listed(config) if not only or each[0] in only)
    kept = programs.distinct_passes(each for each in passes(config) if not only or each[0] in only)
    records = []
    for target in targets:
        with _stderr_to(LOG):
            mesh = sharding.make_mesh(**config.mesh, devices=devices(target))
        sizes = "x".join(str(mesh.shape[axis]) for axis in sharding.AXES)
        print(f"{target.name}, mesh {sizes}{_of_processes(mesh)}", flush=True)
        for task in _tasks(trainings, kept, mesh, evaluation):
            record, line = _compile(task, mesh, target)
            print(f"  {task.what} {line}", flush=True)
            records.append(
                {"target": target.name, "program": task.names, "what": task.what, **record}
            )
    return records


def _tasks(
    trainings: Mapping[str, Training], passes: Mapping[str, Pass], mesh: Any, evaluation: bool
) -> Iterator[_Task]:
    evaluated: set[str] | None = set() if evaluation else None
    for names, one in trainings.items():
        yield from _of_training(names, one, mesh, evaluated)
    for names, made in passes.items():
        traced = ahead.trace_on_one(made.function, made.static, made.arrays, mesh=mesh)
        yield _Task("soft targets", names, traced, 1, made.parameters, devices=1)


def _compile(task: _Task, mesh: Any, target: Target) -> tuple[dict[str, Any], str]:
    """The record of a program, and the line that is printed of it."""
    begun = time.monotonic()
    try:
        with _stderr_to(LOG):
            compiled = task.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        too_large = "RESOURCE_EXHAUSTED" in str(error)
        found = {"fits": False if too_large else None, "error": _in_a_line(error)}
        verdict = "DOESN'T FIT" if too_large else "DOESN'T COMPILE"
        return found, f"{task.names}: {verdict}: {found['error']}"
    figures = measure(
        task.traced,
        compiled,
        mesh,
        target.chip,
        steps=task.steps,
        parameters=task.parameters,
        devices=task.devices,
        waiting=task.waiting,
    )
    found = figures._asdict() | {
        "fits": figures.total <= target.chip.memory,
        "compile_seconds": time.monotonic() - begun,
    }
    return found, _line(task.names, figures, target)


def _of_training(
    names: str, one: Training, mesh: Any, evaluated: set[str] | None
) -> Iterator[_Task]:
    """The programs of a training: its epochs, and what counts errors on its largest set.

    That only once for nets, sets and batches that are alike: `evaluated` has those that were. None:
    never.
    """
    recipe = make_recipe(one.net, one.passes, one.transforms)
    steps, sample = ahead.cut(one.fields, recipe, one.reader, one.blocks)
    steps *= 1 if one.blocks else recipe.report_every
    of_one = jax.eval_shape(lambda x: one.model.init(jax.random.key(0), x), sample)
    parameters = one.members * models.parameter_count(of_one)
    try:
        traced = programs.trace(one, mesh)
    except UserError as error:
        raise UserError(f"{names}: {error}") from error
    waiting = _next_block(one, mesh) if one.blocks else 0
    yield _Task("training", names, traced, steps, parameters, mesh.size, waiting)
    if one.evaluation and evaluated is not None:
        largest = max(one.evaluation.values(), key=lambda part: part["label"].shape[0])
        kind = f"{one.model.description} {one.members} {largest} {recipe.rows_at_once}"
        if kind in evaluated:
            return
        evaluated.add(kind)
        traced = ahead.trace_evaluation(
            one.model, largest, recipe, members=one.members, mesh=mesh, reader=one.reader
        )
        yield _Task("evaluation", names, traced, 1, parameters, devices=mesh.size)


def _next_block(one: Training, mesh: Any) -> int:
    """Bytes on each device of the block that is copied there while another is trained on."""
    assert one.blocks is not None
    split = 1 if one.blocks.batch_axis is None else mesh.shape["data"]
    sizes = {name: field.size * field.dtype.itemsize for name, field in one.fields.items()}
    return (
        sum(size * (one.members if name in one.own else 1) for name, size in sizes.items()) // split
    )


def _of_processes(mesh: Any) -> str:
    """Which part of the mesh each process has, such as "; 2 processes: data 0-3; data 4-7"."""
    process_of = np.vectorize(lambda device: device.process_index)(mesh.devices)
    indices = np.unique(process_of)
    if len(indices) == 1:
        return ""
    parts = [_part(mesh, np.argwhere(process_of == index)) for index in indices]
    shown = parts if len(parts) <= 4 else [*parts[:3], "...", parts[-1]]
    return f"; {len(parts)} processes: {'; '.join(shown)}"


def _part(mesh: Any, places: np.ndarray) -> str:
    """The axes that are split, each with the numbers of some devices on it."""
    return ", ".join(
        f"{axis} {_numbers(np.unique(own).tolist())}"
        for axis, own in zip(sharding.AXES, places.T, strict=True)
        if mesh.shape[axis] > 1
    )


def _numbers(found: list[int]) -> str:
    first, last = found[0], found[-1]
    if found != list(range(first, last + 1)):
        return " ".join(map(str, found))
    return f"{first}-{last}" if last > first else str(first)


def _line(names: str, found: Figures, target: Target) -> str:
    share = found.total / target.chip.memory
    verdict = (
        "fits" if share <= 1 else "DOESN'T FIT: a larger mesh.model or micro_batches, or streaming"
    )
    parts = [
        f"{found.parameters / 1e6:.1f}M parameters",
        f"{found.arguments / 1e6:.0f} + {found.temporary / 1e6:.0f} + {found.output / 1e6:.0f} MB"
        + (f", {100 * share:.0f} %" if share else ""),
        f"{found.flops / 1e9:.2f} GFLOP",
        f"{found.moved / 1e6:.0f} MB moved",
        *(
            f"{count} {kind} over {axes}, {size / 1e6:.2f} MB"
            for kind, axes, count, size in found.sent
        ),
    ]
    bounds = found.bounds
    if bounds:
        largest = max(bounds, key=lambda name: bounds[name])
        parts.append(f"at least {1e3 * bounds[largest]:.3f} ms ({largest})")
    first, *others = names.split(", ")
    alike = f" (and {len(others)} alike)" if others else ""
    return f"{first}{alike}: {'; '.join(parts)}: {verdict}"


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Sends what compiled libraries print on stderr to a file."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with path.open("a") as log:
            os.dup2(log.fileno(), 2)
            yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
