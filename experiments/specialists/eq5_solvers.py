"""How fast the ways of solving Eq. 5 are: passes, time and memory (section 5.4)."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from distill_jax.specialists import eq5, inference
from distill_jax.specialists.inference import Evidence
from experiments.common.study import Context, Row, make_row, write_arrays
from experiments.specialists import generalists, training
from experiments.specialists.data import load_data

CLOSE = 1e-6  # of the reference, in every class


def compare_solvers(context: Context) -> list[Row]:
    """Passes, rate and agreement of the ways to solve Eq. 5, on real predictions of the test set."""
    evidence = _predictions(context)
    write_arrays(context.directory / "predictions.npz", **evidence._asdict())
    found = compare(evidence, context.config.inference.max_passes)
    for name in ("newton", "fixed_point"):
        for other in ("adam", "gradient_descent"):
            found[name] |= _against(other, found[name], found[other])
    return [
        make_row(
            context.config,
            "specialists_inference",
            name.replace("_", " "),
            metric,
            [value],
            seconds=0.0,
        )
        for name, numbers in found.items()
        for metric, value in numbers.items()
    ]


def _predictions(context: Context) -> Evidence:
    """Those of some test examples with an active specialist, by the first seed's nets."""
    config, data = context.config, load_data(context.config)
    generalist, specialists = generalists.load(context, 0), training.load_stage(context, 0)
    random = np.random.default_rng(config.data.seed)
    rows = random.permutation(len(data.test["id"]))[: 4 * config.inference.examples]
    inputs = generalist.inputs(data.test["inputs"][np.sort(rows)])
    evidence = inference.run_active(
        specialists, generalist.net.logits(inputs), inputs, n=config.specialists.active_by
    )
    active = np.flatnonzero(evidence.active.any(axis=1))[: config.inference.examples]
    return Evidence(*(np.asarray(field)[active] for field in evidence))


def _against(other: str, ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """Ratios above 1 where ours is the better one."""
    ratios = {metric: theirs[metric] / ours[metric] for metric in ("passes_median", "passes_p99")}
    ratios["examples_per_second"] = ours["examples_per_second"] / theirs["examples_per_second"]
    return {f"{metric}_against_{other}": ratio for metric, ratio in ratios.items()}


def methods(direction: eq5.Direction = "forward") -> dict[str, eq5.Method]:
    """Ours, and the paper's gradient descent on logits, plain and as Adam.

    Adam takes about as many passes with steps of 0.03 to 0.3 on the benchmark's predictions, and more
    with 1. Plain descent is sure to go down with steps below 4, as no curvature of the mean
    divergence is above 1/2, and 2 is the best step for that curvature.
    """
    return {
        "newton": eq5.newton(direction),
        "fixed_point": eq5.fixed_point(direction),
        "adam": eq5.descent(optax.adam(0.1), direction),
        "gradient_descent": eq5.descent(optax.sgd(2.0), direction),
    }


def compare(
    evidence: Evidence, max_passes: int = 2000, direction: eq5.Direction = "forward"
) -> dict[str, dict[str, float]]:
    """Measures all methods on the same examples, as one batch.

    The reference is Newton's solution in float64.

    Args:
        evidence: of N examples that fit in memory together.
        max_passes: where a method is given up.
        direction: of the divergences in Eq. 5.

    Returns:
        For each method: "passes_median" and "passes_p99" until q is within 1e-6 of the reference in
        every class (`max_passes` if it isn't by then), "unfinished", the share of examples that were
        given up; "examples_per_second" with as many passes as the slowest example needs;
        "temporary_bytes" of that program; "top1_agreement" with the reference, a share.
    """
    target = reference(evidence, direction)
    found = {}
    for name, method in methods(direction).items():
        passes, reached = passes_needed(evidence, method, target, max_passes)
        q, seconds, temporary = _run(evidence, method, passes.max())
        found[name] = {
            "passes_median": float(np.median(passes)),
            "passes_p99": float(np.percentile(passes, 99)),
            "unfinished": float(1 - reached.mean()),
            "examples_per_second": len(q) / seconds,
            "temporary_bytes": temporary,
            "top1_agreement": float((q.argmax(-1) == target.argmax(-1)).mean()),
        }
    return found


def reference(evidence: Evidence, direction: eq5.Direction = "forward") -> np.ndarray:
    """q float64 `[N, C]`, with a residual of 1e-12, computed on the host."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        logits = (np.asarray(x, np.float64) for x in evidence[:2])
        double = Evidence(*logits, *(np.asarray(x) for x in evidence[2:]))
        return np.asarray(inference.combine(double, eq5.newton(direction), 1e-12, 200)[0])


def passes_needed(
    evidence: Evidence, method: eq5.Method, target: np.ndarray, max_passes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Passes int `[N]` to within 1e-6 of the target `[N, C]`, and bool `[N]`, whether they got there."""
    passes, errors = _approach(tuple(evidence), target.astype(np.float32), max_passes, method)
    return np.asarray(passes), np.asarray(errors) <= CLOSE


@functools.partial(jax.jit, static_argnames="method")
@functools.partial(jax.vmap, in_axes=(0, 0, None, None))
def _approach(
    arrays: tuple[Array, ...], target: Array, max_passes: Array, method: eq5.Method
) -> tuple[Array, Array]:
    problem = eq5.pose(*arrays)

    def error(state: eq5.State) -> Array:
        return jnp.max(jnp.abs(method.solution(problem, state) - target))

    def one_pass(carry: tuple[eq5.State, Array, Array]):
        state, passes, _ = carry
        state, _ = method.step(problem, state)
        return state, passes + 1, error(state)

    start = method.start(problem)
    _, passes, errors = jax.lax.while_loop(
        lambda carry: (carry[2] > CLOSE) & (carry[1] < max_passes),
        one_pass,
        (start, jnp.int32(method.start_passes), error(start)),
    )
    return passes, errors


def _run(evidence: Evidence, method: eq5.Method, passes: int) -> tuple[np.ndarray, float, int]:
    """q after so many passes, the median of the seconds it takes, and its temporary bytes."""
    size = len(evidence.generalist)
    combine = functools.partial(inference.combine, method=method, batch_size=size)
    never = -1.0  # the tolerance: all passes are taken
    compiled = jax.jit(combine).lower(evidence, tolerance=never, max_passes=passes).compile()
    evidence = jax.tree.map(jnp.asarray, evidence)
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < 2.0:
        start = time.perf_counter()
        q, _ = jax.block_until_ready(compiled(evidence, tolerance=never, max_passes=passes))
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    assert memory is not None
    return np.asarray(q), statistics.median(seconds), memory.temp_size_in_bytes
