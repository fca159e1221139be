"""What nets cost, and how good their predictions are beside their errors: a table of each study."""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import export, losses, metrics, models, soft_targets
from distill_jax.models import Params
from distill_jax.nets import Net
from experiments.common.study import Row, make_row

CAPTION = (
    "What it costs, and what it is worth. Bytes are those of the exported program (StableHLO, float32); "
    "milliseconds are the median of warm calls on the device that is named, for 1 and 256 examples; "
    "FLOPs are the compiler's, for one of 256. Agreement is with the most probable class of the first "
    "row, and the KL divergence, in nats, from its distribution, both at T = 1; likelihood, in nats, "
    "and the calibration error (15 bins) are of labels. One net of each kind, on test examples."
)
_BATCH = 256
_SECONDS = 0.5  # of repeated calls
MOST = 10_000  # test examples


class Candidate(NamedTuple):
    """A net, or several that act as one. apply: `(params, inputs [B, ...]) -> logits [B, C]`."""

    row: str
    apply: Callable[[Params, Array], Array]
    params: Params


def of_net(row: str, net: Net) -> Candidate:
    """A net, or the first of several."""
    one = net if net.members is None else net.member(0)
    return Candidate(row, one.model.apply, one.params)


def rows(
    config: ConfigDict,
    table: str,
    candidates: Sequence[Candidate],
    inputs: np.ndarray,
    labels: np.ndarray,
) -> list[Row]:
    """The table's rows; the first candidate is the teacher that the others are compared with.

    Args:
        config: of the study.
        table: its name.
        candidates: in the table's order.
        inputs: `[N, ...]` of test examples, of which the first 10,000 are used.
        labels: int `[N]`, below 0 where unknown.
    """
    inputs, known = inputs[:MOST], jnp.asarray(labels[:MOST])
    found = []
    teacher = None
    for candidate in candidates:
        logits = jnp.asarray(soft_targets.logits_over(candidate.apply, candidate.params, inputs))
        teacher = logits if teacher is None else teacher
        measured = {**dict(_costs(candidate, inputs)), **dict(_quality(logits, known, teacher))}
        found += [
            make_row(config, table, candidate.row, metric, [value], seconds=0.0, device=_device())
            for metric, value in measured.items()
        ]
    return found


def milliseconds(call: Callable[[], Any]) -> float:
    """The median time of a call that is compiled, over half a second of calls, at least five."""
    jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < 5 or sum(times) < _SECONDS:
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return 1000.0 * statistics.median(times)


def _costs(candidate: Candidate, inputs: np.ndarray) -> Iterator[tuple[str, float]]:
    yield "parameters", models.parameter_count(candidate.params)
    params = candidate.params
    program = export.stablehlo(
        lambda inputs: {"logits": candidate.apply(params, inputs)}, inputs[:1]
    )
    yield "exported_bytes", len(program)
    on_device = jax.tree.map(jnp.asarray, params)
    for size in (1, _BATCH):
        some = jnp.asarray(np.resize(inputs, (size, *inputs.shape[1:])))
        compiled = jax.jit(candidate.apply).lower(on_device, some).compile()
        yield f"ms_for_{size}", milliseconds(functools.partial(compiled, on_device, some))
    analysis = compiled.cost_analysis() or {}
    if analysis.get("flops", 0) > 0:  # not every device's compiler counts them
        yield "flops_per_example", analysis["flops"] / _BATCH


def _quality(logits: Array, labels: Array, teacher: Array) -> Iterator[tuple[str, float]]:
    counts = metrics.error_counts(logits, labels)
    yield "error_percent", 100.0 * float(counts["errors"]) / float(counts["count"])
    if logits is not teacher:
        yield "agreement_percent", 100.0 * float(metrics.agreement(logits, teacher))
        kl = losses.soft_kl(logits, losses.softmax(teacher), 1.0)
        yield "kl_to_teacher", float(jnp.mean(kl))
    yield "negative_log_likelihood", float(metrics.negative_log_likelihood(logits, labels))
    error = metrics.expected_calibration_error(logits, labels)
    yield "calibration_error_percent", 100.0 * float(error)


def _device() -> str:
    device = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind
