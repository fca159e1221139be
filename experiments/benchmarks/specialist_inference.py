"""Passes, examples per second and memory of the ways to solve Eq. 5 (section 5.4 of the paper).

    python -m experiments.benchmarks.specialist_inference

Newton and the fixed point on membership patterns, against gradient descent on logits as in the paper,
plain and as Adam, on drawn predictions of a generalist and specialists, or on a study's own. Every
method is given what it takes to come within 1e-6 of the solution on all examples, or is given up. The
last line is the result as JSON.
"""

import json
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from distill_jax.command import run
from distill_jax.errors import UserError
from distill_jax.specialists import eq5, inference
from distill_jax.specialists.inference import Evidence
from experiments.specialists.eq5_solvers import compare

_SIZES = flags.DEFINE_list(
    "sizes",
    ["1000x24x75", "2965x61x300", "15000x61x300"],
    "Classes x specialists x classes of a specialist, of drawn predictions.",
)
_PREDICTIONS = flags.DEFINE_string(
    "predictions",
    None,
    "An .npz of real ones instead: generalist [N, C], specialists [N, A, S + 1], class_sets and active.",
)
_EXAMPLES = flags.DEFINE_integer("examples", 64, "Examples, solved as one batch.", lower_bound=1)
_MAX_PASSES = flags.DEFINE_integer("max_passes", 1000, "When to give up.", lower_bound=1)
_REVERSE = flags.DEFINE_bool("reverse", False, "KL(q, p) instead of the paper's KL(p, q).")


def main() -> None:
    """Measures, and prints the tables and the JSON line."""
    size = _EXAMPLES.value
    cases = [_PREDICTIONS.value] if _PREDICTIONS.value else _SIZES.value
    direction: eq5.Direction = "reverse" if _REVERSE.value else "forward"
    figures: dict[str, dict[str, float]] = {}
    for case in cases:
        evidence = read(case, size) if _PREDICTIONS.value else draw(*_size(case), size)
        found = compare(evidence, _MAX_PASSES.value, direction)
        _print_table(case, evidence, found)
        figures |= {f"{case} {name}": numbers for name, numbers in found.items()}
    result = {
        "benchmark": "specialist_inference",
        "device": jax.default_backend(),
        "direction": direction,
        "examples": _EXAMPLES.value,
        "max_passes": _MAX_PASSES.value,
        "ratios": _ratios(figures, cases),
        "figures": figures,
    }
    print(json.dumps(result))


def draw(num_classes: int, num_specialists: int, special: int, size: int) -> Evidence:
    """Peaked predictions of models that mostly agree; popular classes are in several sets.

    The generalist's are from a Dirichlet distribution; a specialist's are four parts the same, each
    probability off by a factor of about e, and one part from a Dirichlet distribution of its own.
    """
    random = np.random.default_rng(0)
    popularity = random.dirichlet(np.full(num_classes, 2.0)) + 0.1 / num_classes
    popularity /= popularity.sum()
    sets = np.stack(
        [
            random.choice(num_classes, special, replace=False, p=popularity)
            for _ in range(num_specialists)
        ]
    ).astype(np.int32)
    covered = np.unique(sets)
    g = np.maximum(random.dirichlet(np.full(num_classes, 12.0 / num_classes), size), 1e-12)
    # Every example's first choice is in some set, as otherwise there is nothing to solve.
    rows, first = np.arange(size), random.choice(covered, size)
    best = g.argmax(-1)
    g[rows, best], g[rows, first] = g[rows, first], g[rows, best]
    g /= g.sum(-1, keepdims=True)
    logits = np.log(g).astype(np.float32)
    found = inference.active_specialists(jnp.asarray(logits), jnp.asarray(sets), num_specialists)
    ids, active, count = (np.asarray(x) for x in found)
    ids, active = ids[:, : count.max()], active[:, : count.max()]
    chosen = sets[ids]
    p = np.take_along_axis(g[:, None], chosen, -1)
    p = np.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1).clip(1e-12)
    p *= np.exp(random.standard_normal(p.shape))
    own = random.dirichlet(np.full(special + 1, 0.3), p.shape[:2])
    p = 0.8 * p / p.sum(-1, keepdims=True) + 0.2 * own
    return Evidence(logits, np.log(p).astype(np.float32), chosen, active)


def read(path: str | os.PathLike[str], size: int) -> Evidence:
    """The first `size` examples of an .npz with the fields of `Evidence`; else a UserError."""
    try:
        with np.load(path) as arrays:
            return Evidence(*(arrays[name][:size] for name in Evidence._fields))
    except (OSError, KeyError, ValueError) as error:
        expected = ", ".join(Evidence._fields)
        raise UserError(f"--predictions={path} is not an .npz of {expected}: {error}") from error


def _size(case: str) -> tuple[int, int, int]:
    try:
        num_classes, num_specialists, special = (int(number) for number in case.split("x"))
    except ValueError:
        raise UserError(f"--sizes has {case!r}; expected such as 1000x24x75") from None
    return num_classes, num_specialists, special


def _ratios(figures: dict[str, dict[str, float]], cases: Sequence[str]) -> dict[str, float]:
    """Above 1: Newton is the better one. Where a method was given up, it is at least that."""
    ratios = {}
    for case in cases:
        ours = figures[f"{case} newton"]
        for other in ("gradient_descent", "adam", "fixed_point"):
            theirs = figures[f"{case} {other}"]
            for share in ("median", "p99"):
                key = f"passes_{share}"
                ratios[f"{case} {key} {other}/newton"] = theirs[key] / ours[key]
            rate = "examples_per_second"
            ratios[f"{case} {rate} newton/{other}"] = ours[rate] / theirs[rate]
    return ratios


def _print_table(case: str, evidence: Evidence, found: dict[str, dict[str, float]]) -> None:
    active = np.asarray(evidence.active).sum(-1)
    print(f"\n{case}: {active.mean():.1f} active specialists, at most {active.max()}")
    print(f"{'':18}{'passes':>8}{'p99':>8}{'given up':>10}{'examples/s':>12}{'MB':>8}{'top-1':>8}")
    for name, numbers in found.items():
        print(
            f"{name:18}{numbers['passes_median']:8.0f}{numbers['passes_p99']:8.0f}"
            f"{numbers['unfinished']:10.0%}{numbers['examples_per_second']:12.0f}"
            f"{numbers['temporary_bytes'] / 1e6:8.1f}{numbers['top1_agreement']:8.1%}"
        )


if __name__ == "__main__":
    run(main)
