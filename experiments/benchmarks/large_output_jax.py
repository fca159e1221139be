"""The work of `large_output` in JAX: the fused loss, and the dense one."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import fused_loss, soft_targets, step_losses, train_step
from experiments.benchmarks.large_output_work import (
    TEMPERATURE,
    Case,
    Gradients,
    Work,
    draw,
    hard_weight,
)
from experiments.benchmarks.measure import peak_resident

STORED, TEACHER = step_losses.top_k_distillation_loss(), step_losses.hidden_teacher_loss()


class Program(NamedTuple):
    """A case, ready to run.

    run: does the work, waits for it and returns what `fetch` takes. sizes: bytes of the compiled
    program's memory, as XLA says.
    """

    run: Callable[[], Any]
    fetch: Callable[[Any], Gradients]
    sizes: Mapping[str, int] = {}


class Framework(NamedTuple):
    """What a worker works with. peak: bytes that a run takes at most beyond what is there, or None."""

    name: str
    device: str
    build: Callable[[Case], Program]
    peak: Callable[[Callable[[], Any]], int | None]


def start_jax() -> Framework:
    """JAX on its default device."""
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    return Framework(
        f"jax {jax.__version__} on {device.device_kind}, {os.cpu_count()} cores",
        device.platform,
        _build,
        _peak_on_device if gpu else peak_resident,
    )


def _build(case: Case) -> Program:
    work = _put(case._replace(way="", rows=0))
    layer = {"kernel": work.kernel, "bias": work.bias}
    program = jax.jit(jax.value_and_grad(functools.partial(_mean_loss, case), argnums=(0, 1)))
    arguments = (work.hidden, layer, *_targets(case, work))
    compiled = program.lower(*arguments).compile()
    return Program(lambda: jax.block_until_ready(compiled(*arguments)), _fetch, _sizes(compiled))


@functools.cache
def _put(case: Case) -> Work:
    """The work on the device, with its layers in the case's dtype."""
    work = draw(case)
    layers = [jnp.asarray(x, case.dtype) for x in work[:6]]
    return Work(*layers, *map(jnp.asarray, work[6:]))


def _targets(
    case: Case, work: Work
) -> tuple[train_step.Batch, tuple[train_step.Batch, train_step.Hyper]]:
    """The fields of examples; those that are the same for all, and the numbers."""
    numbers = {"temperature": TEMPERATURE, "hard_weight": hard_weight(case)}
    hyper = {name: jnp.float32(number) for name, number in numbers.items()}
    if case.targets == "stored":
        stored = zip(
            soft_targets.TOP_K_FIELDS, (work.ids, work.probabilities, work.tail), strict=True
        )
        return {"label": work.label, **dict(stored)}, ({}, hyper)
    layer = {"kernel": work.teacher_kernel[None], "bias": work.teacher_bias[None]}
    fields = {"label": work.label, "teacher_hidden": work.teacher_hidden[:, None]}
    return fields, ({"teacher_layer": layer}, hyper)


def _mean_loss(
    case: Case, hidden: Array, layer: fused_loss.Layer, fields: train_step.Batch, constants: Any
) -> Array:
    if case.way == "dense":
        return jnp.mean(_dense(case, hidden, layer, fields, constants))
    loss = STORED if case.targets == "stored" else TEACHER

    def of_chunk(logits: Array, fields: train_step.Batch, constants: Any) -> Array:
        teachers, hyper = constants
        return loss(logits, fields, hyper, teachers)

    mean, _ = fused_loss.mean_loss(
        of_chunk, hidden, layer, fields, constants, rows=case.rows or None
    )
    return mean


def _dense(
    case: Case, hidden: Array, layer: fused_loss.Layer, fields: train_step.Batch, constants: Any
) -> Array:
    """As the step does it without the switch: the nets' own logits, the teacher's too."""
    teachers, hyper = constants
    logits = _logits(hidden, layer)
    if case.targets == "stored":
        return STORED(logits, fields, hyper, None)
    teacher = jax.tree.map(lambda x: x[0], teachers["teacher_layer"])
    teacher_logits = _logits(fields["teacher_hidden"][:, 0], teacher)
    return step_losses.distillation_loss(
        logits, {**fields, "teacher_logits": teacher_logits}, hyper
    )


def _logits(hidden: Array, layer: fused_loss.Layer) -> Array:
    """As the nets of `distill_jax.models` make them: in the dtype of the activations, then float32."""
    return (hidden @ layer["kernel"] + layer["bias"][None]).astype(jnp.float32)


def _fetch(result: Any) -> Gradients:
    loss, (hidden, layer) = result
    gradients = (hidden, layer["kernel"], layer["bias"])
    return Gradients(float(loss), *(np.asarray(x.astype(jnp.float32)) for x in gradients))


def _sizes(compiled: Any) -> dict[str, int]:
    found = compiled.memory_analysis()
    return {
        "temporary_bytes": found.temp_size_in_bytes,
        "argument_bytes": found.argument_size_in_bytes,
        "output_bytes": found.output_size_in_bytes,
    }


def _peak_on_device(run: Callable[[], Any]) -> int:
    """The device's peak is that of the whole process, so this is right for the largest run in it."""
    device = jax.devices()[0]
    before = device.memory_stats()["bytes_in_use"]
    run()
    return device.memory_stats()["peak_bytes_in_use"] - before
