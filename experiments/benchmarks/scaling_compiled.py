"""The plan for larger machines beside what their compilers make of it; nothing is run.

    python -m experiments.benchmarks.scaling_compiled

One net of each acoustic job of `scaling_plan`, on the mesh that is best for it there, compiled for a
part of the machine that has as many chips: memory of a device, bytes that it sends in a step, and the
least time of a step by the chip's figures. The plan's bytes and time stand beside them: the plan takes
half of the peak rate and adds its parts up, the least time takes the whole rate and the longest part.
Needs the extras aot_tpu and aot_gpu. The last line is the result as JSON.
"""

import json
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from distill_jax import step_losses
from distill_jax.command import run
from experiments.benchmarks import scaling_plan
from experiments.benchmarks.scaling_plan import ACOUSTIC, BFLOAT16, CLUSTERS, JOBS, Cluster, Plan
from experiments.common.config import net_section
from experiments.common.programs import Training
from experiments.common.training import build_model
from experiments.compiled import targets
from experiments.compiled.check import check
from experiments.compiled.program import Figures

_SLICES = {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}  # of a v5e


def main() -> None:
    """Compiles each plan, and prints its figures and the JSON line."""
    planned = [
        (cluster, job, scaling_plan.plans(job, cluster)[0])
        for cluster in CLUSTERS
        for job in JOBS
        if job.parameters == scaling_plan.parameter_count(ACOUSTIC)
    ]
    names = [target_name(cluster, plan.data * plan.model) for cluster, _, plan in planned]
    machines = targets.parse(names)
    targets.prepare(machines)
    figures = {}
    for machine, (cluster, job, plan) in zip(machines, planned, strict=True):
        found = compile_step(ACOUSTIC, job.batch, plan.data, plan.model, machine)
        row = compare(found, ACOUSTIC, job.batch, plan)
        figures[f"{job.name}, {cluster.name}"] = row
        print("    " + "; ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    print(json.dumps({"benchmark": "scaling_compiled", "figures": figures}))


def target_name(cluster: Cluster, chips: int) -> str:
    """A part of the cluster with so many chips, as `launch.main --compile_for` names it."""
    return f"v5e:{_SLICES[chips]}" if "v5e" in cluster.name else f"h100:{chips}"


def compile_step(
    layers: Sequence[int], batch: int, data: int, model: int, machine: targets.Target
) -> Figures:
    """What a plain net's step takes, in bfloat16 by Adam."""
    sizes = dict(hidden=tuple(layers[1:-1]), batch_size=batch, epochs=1, report_every=1)
    net = ConfigDict(net_section(**sizes, dtype="bfloat16"))
    examples = 2 * batch
    fields = {
        "id": jax.ShapeDtypeStruct((examples,), np.int32),
        "inputs": jax.ShapeDtypeStruct((examples, layers[0]), np.uint8),
        "label": jax.ShapeDtypeStruct((examples,), np.int32),
    }

    def listed(_: ConfigDict) -> Iterator[tuple[str, Training]]:
        built = build_model(net, layers[-1])
        yield "acoustic", Training("net", net, built, step_losses.label_loss, fields, 1)

    config = ConfigDict({"mesh": {"member": 1, "data": data, "model": model}})
    (record,) = check(config, listed, lambda _: iter(()), [machine])
    return Figures(**{name: record[name] for name in Figures._fields})


def compare(found: Figures, layers: Sequence[int], batch: int, plan: Plan) -> dict[str, float]:
    """A row: what was compiled, and the plan's figures."""
    return {
        "data": plan.data,
        "model": plan.model,
        "memory_mb": found.total / 1e6,
        "sent_mb": found.sent_bytes / 1e6,
        "planned_mb": scaling_plan.step_bytes(layers, batch, plan.data, plan.model, BFLOAT16) / 1e6,
        "least_ms": 1e3 * max(found.bounds.values(), default=0.0),
        "planned_ms": 1e3 * plan.step,
    }


if __name__ == "__main__":
    run(main)
