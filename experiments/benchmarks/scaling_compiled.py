"""The plan for larger machines beside what their compilers make of it; nothing is run.

    python -m experiments.benchmarks.scaling_compiled

One net of each job of `scaling_plan`, on the mesh that is best for it there, compiled for a part of the
machine that has as many chips: memory of a device, bytes that it sends in a step, and the least time of
a step by the chip's figures. The plan's bytes and time stand beside them: the plan takes
half of the peak rate and adds its parts up, the least time takes the whole rate and the longest part.
Needs the extras aot_tpu and aot_gpu. The last line is the result as JSON.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import models, step_losses
from distill_jax.command import run
from experiments.benchmarks import scaling_plan
from experiments.benchmarks.scaling_plan import (
    ACOUSTIC,
    BFLOAT16,
    CLUSTERS,
    FLOAT32,
    JOBS,
    Cluster,
    Plan,
)
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
        (cluster, job, scaling_plan.plans(job, cluster)[0]) for cluster in CLUSTERS for job in JOBS
    ]
    names = [target_name(cluster, plan.data * plan.model) for cluster, _, plan in planned]
    machines = targets.parse(names)
    targets.prepare(machines)
    figures = {}
    for machine, (cluster, job, plan) in zip(machines, planned, strict=True):
        if job.parameters == scaling_plan.parameter_count(ACOUSTIC):
            net = acoustic(ACOUSTIC, job.batch)
            size = scaling_plan.step_bytes(ACOUSTIC, job.batch, plan.data, plan.model, BFLOAT16)
        else:
            net = specialist(job.batch)
            size = scaling_plan.ring_bytes("all-reduce", FLOAT32 * job.parameters, plan.data)
        row = compare(compile_step(net, plan.data, plan.model, machine), size, plan)
        figures[f"{job.name}, {cluster.name}"] = row
        print("    " + "; ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    print(json.dumps({"benchmark": "scaling_compiled", "figures": figures}))


def target_name(cluster: Cluster, chips: int) -> str:
    """A part of the cluster with so many chips, as `launch.main --compile_for` names it."""
    return f"v5e:{_SLICES[chips]}" if "v5e" in cluster.name else f"h100:{chips}"


def krizhevsky(classes: int) -> models.Model:
    """The net of Krizhevsky et al. 2012 (reference [7]), for images of 227x227 as rows, bfloat16.

    Without dropout and the normalisation of responses, which hardly count in time or memory. It starts
    at zeros: it is compiled, not trained.
    """
    trunk = models.Model(_convolution_kernels, _features)
    return models.chain(trunk, models.mlp((4096, 4096), classes, dtype=jnp.bfloat16))


_IMAGE = (227, 227, 3)
_CONVOLUTIONS = ((96, 11, 4, 1), (256, 5, 1, 2), (384, 3, 1, 1), (384, 3, 1, 2), (256, 3, 1, 2))
"""Channels, side, stride and groups of each; after the first, the second and the last is a maximum."""


def _convolution_kernels(key: Array, images: Array) -> models.Params:
    params, inputs = {}, _IMAGE[-1]
    for i, (channels, side, _, groups) in enumerate(_CONVOLUTIONS):
        kernel = jnp.zeros((side, side, inputs // groups, channels))
        params[f"conv_{i}"] = {"kernel": kernel, "bias": jnp.zeros(channels)}
        inputs = channels
    return params


def _features(params: models.Params, images: Array, dropout_key: Array | None = None) -> Array:
    x = images.reshape(-1, *_IMAGE).astype(jnp.bfloat16) / 128 - 1
    for i, (_, _side, stride, groups) in enumerate(_CONVOLUTIONS):
        kernel, bias = (params[f"conv_{i}"][name].astype(x.dtype) for name in ("kernel", "bias"))
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "VALID" if i == 0 else "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        x = jax.nn.relu(x + jnp.broadcast_to(bias, x.shape))
        if i in (0, 1, 4):
            window = (1, 3, 3, 1), (1, 2, 2, 1), "VALID"
            x = jax.lax.reduce_window(x, np.asarray(-np.inf, x.dtype), jax.lax.max, *window)
    return x.reshape(len(x), -1)


def acoustic(layers: Sequence[int], batch: int) -> Training:
    """A plain net, by its units from inputs to classes."""
    net = _section(batch, hidden=tuple(layers[1:-1]))
    return _training(net, build_model(net, layers[-1]), (layers[0],))


def specialist(batch: int) -> Training:
    """A specialist of 300 classes and the dustbin, of the size of reference [7]'s net."""
    return _training(_section(batch), krizhevsky(301), (math.prod(_IMAGE),))


def _section(batch: int, **sizes: Any) -> ConfigDict:
    """The config's section of a net: Adam, bfloat16."""
    return ConfigDict(
        net_section(**sizes, batch_size=batch, epochs=1, report_every=1, dtype="bfloat16")
    )


def _training(net: ConfigDict, model: models.Model, inputs: tuple[int, ...]) -> Training:
    """An epoch of two batches on labels."""
    examples = 2 * net.batch_size
    fields = {
        "id": jax.ShapeDtypeStruct((examples,), np.int32),
        "inputs": jax.ShapeDtypeStruct((examples, *inputs), np.uint8),
        "label": jax.ShapeDtypeStruct((examples,), np.int32),
    }
    return Training("net", net, model, step_losses.label_loss, fields, 1)


def compile_step(training: Training, data: int, model: int, machine: targets.Target) -> Figures:
    """What a step of a net on such a mesh takes."""

    def listed(_: ConfigDict) -> Iterator[tuple[str, Training]]:
        yield "net", training

    config = ConfigDict({"mesh": {"member": 1, "data": data, "model": model}})
    (record,) = check(config, listed, lambda _: iter(()), [machine])
    return Figures(**{name: record[name] for name in Figures._fields})


def compare(found: Figures, planned_bytes: float, plan: Plan) -> dict[str, float]:
    """A row: what was compiled, and the plan's figures."""
    return {
        "data": plan.data,
        "model": plan.model,
        "memory_mb": found.total / 1e6,
        "sent_mb": found.sent_bytes / 1e6,
        "planned_mb": planned_bytes / 1e6,
        "least_ms": 1e3 * max(found.bounds.values(), default=0.0),
        "planned_ms": 1e3 * plan.step,
    }


if __name__ == "__main__":
    run(main)
