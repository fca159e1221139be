"""Compiles a study's programs for machines that aren't there, and says what they take."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from distill_jax import ahead, models, program, sharding
from distill_jax.errors import UserError
from experiments.common import programs
from experiments.common.programs import Programs, Training
from experiments.common.training import make_recipe
from experiments.compiled.program import Figures, measure
from experiments.compiled.targets import Target, devices

LOG = Path(tempfile.gettempdir()) / "distill_jax_compilers.log"
"""What the compilers print on stderr."""


def check(
    config: ConfigDict,
    listed: Programs,
    targets: Sequence[Target],
    only: Sequence[str] = (),
    *,
    evaluation: bool = True,
) -> list[dict[str, Any]]:
    """Compiles all distinct programs for each target, and prints a line for each.

    Args:
        config: of the study.
        listed: the study's programs.
        targets: the machines.
        only: names of stages; empty for all.
        evaluation: whether to compile what counts errors, too.

    Returns:
        A record of each program on each target: what is printed, as numbers.

    Raises:
        UserError: for a mesh that doesn't fit a target, or batches that don't fit the mesh.
    """
    kept = ((stage, one) for stage, one in listed(config) if not only or stage in only)
    distinct = programs.distinct(kept)
    records = []
    for target in targets:
        with _stderr_to(LOG):
            mesh = sharding.make_mesh(**config.mesh, devices=devices(target))
        print(
            f"{target.name}, mesh {'x'.join(str(mesh.shape[a]) for a in sharding.AXES)}", flush=True
        )
        evaluated: set[str] | None = set() if evaluation else None
        for names, one in distinct.items():
            for what, traced, steps, parameters in _traced(names, one, mesh, evaluated):
                begun = time.monotonic()
                record: dict[str, Any] = {"target": target.name, "program": names, "what": what}
                try:
                    with _stderr_to(LOG):
                        compiled = traced.lower().compile()
                except jax.errors.JaxRuntimeError as error:
                    record |= {"fits": False, "error": _in_a_line(error)}
                    print(f"  {what} {names}: DOESN'T FIT: {record['error']}", flush=True)
                    records.append(record)
                    continue
                found = measure(
                    traced,
                    compiled,
                    mesh,
                    target.chip,
                    steps=steps,
                    parameters=parameters,
                    over_data=what == "training",
                )
                record |= found._asdict() | {
                    "fits": found.total <= target.chip.memory,
                    "compile_seconds": time.monotonic() - begun,
                }
                records.append(record)
                print(_line(what, names, found, target), flush=True)
    return records


def _traced(
    names: str, one: Training, mesh: Any, evaluated: set[str] | None
) -> Iterator[tuple[str, Any, int, int]]:
    """The programs of a training: its epochs, and what counts errors on its largest set.

    That only once for nets and sets that are alike: `evaluated` has those that were. None: never.
    """
    recipe = make_recipe(one.net, one.passes, one.transforms)
    fields = [one.fields]
    steps = program.cut(recipe, fields, one.reader, one.name).steps * recipe.report_every
    sample = program.sample_input(fields, one.reader.gather)
    of_one = jax.eval_shape(lambda x: one.model.init(jax.random.key(0), x), sample)
    parameters = one.members * models.parameter_count(of_one)
    try:
        traced = programs.trace(one, mesh)
    except UserError as error:
        raise UserError(f"{names}: {error}") from error
    yield "training", traced, steps, parameters
    if one.evaluation and evaluated is not None:
        largest = max(one.evaluation.values(), key=lambda part: part["label"].shape[0])
        kind = f"{one.model.description} {one.members} {largest}"
        if kind in evaluated:
            return
        evaluated.add(kind)
        traced = ahead.trace_evaluation(
            one.model, largest, members=one.members, mesh=mesh, reader=one.reader
        )
        yield "evaluation", traced, 1, parameters


def _line(what: str, names: str, found: Figures, target: Target) -> str:
    share = found.total / target.chip.memory
    verdict = (
        "fits" if share <= 1 else "DOESN'T FIT: a larger mesh.model or micro_batches, or streaming"
    )
    parts = [
        f"{found.parameters / 1e6:.1f}M parameters",
        f"{found.arguments / 1e6:.0f} + {found.temporary / 1e6:.0f} + {found.output / 1e6:.0f} MB"
        + (f", {100 * share:.0f} %" if share else ""),
        f"{found.flops / 1e9:.2f} GFLOP",
        *([f"{found.moved / 1e6:.0f} MB moved"] if found.moved else []),
        *(
            f"{count} {kind} over {axes}, {size / 1e6:.2f} MB"
            for kind, axes, count, size in found.sent
        ),
    ]
    bounds = {"compute": found.compute, "memory": found.memory, "links": found.links}
    known = {name: 1e3 * seconds for name, seconds in bounds.items() if seconds}
    if known:
        largest = max(known, key=lambda name: known[name])
        parts.append(f"at least {known[largest]:.3f} ms ({largest})")
    first, *others = names.split(", ")
    alike = f" (and {len(others)} alike)" if others else ""
    return f"  {what} {first}{alike}: {'; '.join(parts)}: {verdict}"


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
