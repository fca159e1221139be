r"""Eq. 5 of the paper for one example: the distribution q that agrees best with all predictions.

Forward, as in the paper: `KL(p^g, q) + sum_m KL(p^m, q)`, over the active specialists m; reverse:
`KL(q, p^g) + sum_m KL(q, p^m)`. A specialist predicts its set S_m and one dustbin of probability
d_m, which is compared with `Q_m = sum_{i not in S_m} q_i`. The generalist is a model that names all
classes and has no dustbin.

**Patterns.** A pattern is a group of classes that belong to the same active sets. They occur in every
Q_m together, so their shares of the pattern are known from the start, and only the masses y_p of the
patterns are unknown: at most 2^A numbers instead of C. There are 1 + A models, k_p of which name the
classes of pattern p.

**Forward.** With a_i the sum of all predictions that name class i, q minimises
`-sum_i a_i log q_i - sum_m d_m log Q_m`. The shares are those of a, which sums to a_p in a pattern.

- Fixed point: `y_p <- (a_p + sum_{m: p outside} d_m y_p / Q_m) / (1 + A)`.
- Dual: with `u_m = d_m / Q_m` and `s = 1 + A - sum_m u_m`, the minimum has `y_p = a_p / r_p` where
  `r_p = s + sum_{m: p inside} u_m`, and (s, u) maximises the concave
  `sum_p a_p log r_p + sum_m d_m log u_m - s - sum_m u_m`.

**Reverse.** With l_i the mean of the logarithms of the k_i predictions that name class i, q minimises
`sum_i k_i q_i (log q_i - l_i) + sum_m Q_m log(Q_m / d_m)`. The shares are those of exp(l), which sums
to Z_p in a pattern.

- Fixed point, up to a constant:
  `log y_p <- (k_p log Z_p + sum_{m: p outside} log(d_m y_p / Q_m)) / (1 + A)`.
- Dual: with `t_m = log(Q_m / d_m)`, the minimum has
  `log y_p = log Z_p + (s + sum_{m: p inside} t_m) / k_p`, and (s, t) maximises the concave
  `s + sum_m t_m - sum_p k_p y_p - sum_m d_m exp(t_m)`.

**Fixed point.** A pass spreads each dustbin over the classes outside the set in proportion to q, then
takes the arithmetic or geometric mean of all models. This is EM for partly observed categories
(Dempster, Laird, Rubin 1977), and never increases the objective. With at most one active specialist the
first pass is the solution in closed form; where all models name all classes, it is the paper's
arithmetic or geometric mean. It converges slowly where the mass of a dustbin lies on classes to which
no model gives any. All methods start from y in proportion to a_p or Z_p.

**Newton.** Steps in the dual have 1 + A unknowns and converge quadratically. Float32 suffices because s
is an unknown of its own and not a difference: s may be 1e-12 of u. Let w be the largest relative
increase of a mass that the full step predicts. The step length 1 / (1 + w) keeps r and u positive and
ascends by at least half the predicted gain: `-log(1 - x) - x <= x^2 / (2 (1 - x))` forward, and
`exp(x) <= 1 / (1 - x)` reverse.

A dustbin with probability 0, or with no class outside, has no term; in reverse, a probability of 0 is a
veto on the classes outside. Probabilities are at least 1e-30, but 0 for a logit of -inf.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from distill_jax.errors import UserError
from distill_jax.specialists.eq5_problem import SMALLEST as SMALLEST
from distill_jax.specialists.eq5_problem import Problem as Problem
from distill_jax.specialists.eq5_problem import pose as pose

Direction = Literal["forward", "reverse"]
State = Any  # a tree of arrays

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # no TF32 on a GPU


class Method(NamedTuple):
    """A way to solve Eq. 5.

    start: `problem -> state`.
    step: `(problem, state) -> (state, residual)`, one pass. The residual is the distance of the given
        state from a minimum, in units of probability.
    solution: `(problem, state) -> q [C]`, with sum 1.
    start_passes: number of passes that `start` has already made.
    """

    start: Callable[[Problem], State]
    step: Callable[[Problem, State], tuple[State, Array]]
    solution: Callable[[Problem, State], Array]
    start_passes: int = 0


def solve(
    problem: Problem, method: Method, tolerance: Array, max_passes: Array
) -> tuple[Array, Array]:
    """Makes passes until the residual is at most `tolerance`.

    Args:
        problem: from `pose`.
        method: `newton()`, `fixed_point()` or `descent(...)`.
        tolerance: float, in units of probability.
        max_passes: int32.

    Returns:
        q `[C]`, and the number of passes, int32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax.specialists import eq5
        >>> generalist = jnp.log(jnp.array([0.5, 0.3, 0.2]))
        >>> specialists = jnp.log(jnp.array([[0.2, 0.7, 0.1]]))
        >>> problem = eq5.pose(generalist, specialists, jnp.array([[0, 1]]), jnp.array([True]))
        >>> q, passes = eq5.solve(problem, eq5.newton(), jnp.float32(1e-6), jnp.int32(20))
        >>> print(q, passes < 20)
        [0.35 0.5 0.15] True
    """

    def unfinished(carry: tuple[State, Array, Array]) -> Array:
        _, residual, passes = carry
        return (residual > tolerance) & (passes < max_passes)

    def one_pass(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        state, _, passes = carry
        return *method.step(problem, state), passes + 1

    unknown = jnp.full((), jnp.inf, problem.masses.dtype)
    start = method.start(problem), unknown, jnp.int32(method.start_passes)
    state, _, passes = jax.lax.while_loop(unfinished, one_pass, start)
    return method.solution(problem, state), passes


def fixed_point(direction: Direction = "forward") -> Method:
    """The fixed point on the masses of the patterns; the residual is the largest change in a pass.

    Raises:
        UserError: for another direction.

    Examples:
        >>> from distill_jax.specialists import eq5
        >>> eq5.fixed_point("reverse").start_passes
        0
    """
    return _either(direction, _FIXED_POINT)


def newton(direction: Direction = "forward") -> Method:
    """Newton's method in the dual, after one pass of the fixed point.

    The residual is that of `sum q = 1` and of each `Q_m`, the conditions that the dual relaxes.

    Raises:
        UserError: for another direction.

    Examples:
        >>> from distill_jax.specialists import eq5
        >>> eq5.newton().start_passes
        1
    """
    return _either(direction, _NEWTON)


def descent(optimizer: optax.GradientTransformation, direction: Direction = "forward") -> Method:
    """Gradient descent on logits z with `q = softmax(z)`, as in the paper.

    The objective is Eq. 5 divided by the number of models, so that one learning rate suits every number.
    The residual is the largest entry of its gradient. Programs are compiled for a method object: make
    it once and reuse it.

    Raises:
        UserError: for another direction.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from distill_jax.specialists import eq5
        >>> generalist = jnp.log(jnp.array([0.5, 0.3, 0.2]))
        >>> specialists = jnp.log(jnp.array([[0.2, 0.7, 0.1]]))
        >>> problem = eq5.pose(generalist, specialists, jnp.array([[0, 1]]), jnp.array([True]))
        >>> method = eq5.descent(optax.sgd(1.0))
        >>> q, _ = eq5.solve(problem, method, jnp.float32(1e-4), jnp.int32(1000))
        >>> print(q)
        [0.35 0.5 0.15]
    """
    objective = _either(direction, {"forward": _forward_objective, "reverse": _reverse_objective})

    def loss(z: Array, problem: Problem) -> Array:
        total = jnp.sum(problem.masses) + jnp.sum(problem.dustbins)
        return objective(problem, jax.nn.log_softmax(z)) / total

    def start(problem: Problem) -> State:
        z = jnp.log(problem.sums) if direction == "forward" else problem.log_means
        return z, optimizer.init(z)

    def step(problem: Problem, state: State) -> tuple[State, Array]:
        z, memory = state
        gradient = jax.grad(loss)(z, problem)
        updates, memory = optimizer.update(gradient, memory, z)
        return (z + updates, memory), jnp.max(jnp.abs(gradient))

    return Method(start, step, lambda problem, state: jax.nn.softmax(state[0]))


def _either(direction: Direction, choices: dict[Direction, Any]) -> Any:
    if direction not in choices:
        raise UserError(f"direction must be 'forward' or 'reverse', not {direction!r}")
    return choices[direction]


def _over(numerator: Array, denominator: Array) -> Array:
    """The quotient, where the numerator is not 0; else 0."""
    return jnp.where(numerator > 0, numerator / jnp.where(numerator > 0, denominator, 1.0), 0.0)


def _outside(problem: Problem, y: Array) -> Array:
    """Q_m `[1 + A]`; a sum of masses, which is more exact than 1 minus those inside."""
    return _dot(1.0 - problem.names, y)


def _log_ratios(problem: Problem, outside: Array) -> Array:
    """`log(Q_m / d_m)` of the dustbins with a term; else 0."""
    d = problem.dustbins
    return jnp.where(d > 0, jnp.log(outside + SMALLEST) - jnp.log(jnp.where(d > 0, d, 1.0)), 0.0)


def _forward_objective(problem: Problem, log_q: Array) -> Array:
    """Eq. 5 without the terms that do not depend on q."""
    y = jax.ops.segment_sum(jnp.exp(log_q), problem.patterns, len(problem.masses))
    named = problem.sums * jnp.where(problem.sums > 0, log_q, 0.0)
    return -jnp.sum(named) - jnp.sum(problem.dustbins * _log_ratios(problem, _outside(problem, y)))


def _reverse_objective(problem: Problem, log_q: Array) -> Array:
    possible = jnp.isfinite(problem.log_means)
    models = jnp.sum(problem.names, axis=0)[problem.patterns]
    gaps = jnp.where(possible, log_q, 0.0) - jnp.where(possible, problem.log_means, 0.0)
    y = jax.ops.segment_sum(jnp.exp(log_q), problem.patterns, len(problem.masses))
    outside = _outside(problem, y)
    named = jnp.sum(models * jnp.exp(log_q) * gaps)
    return named + jnp.sum(outside * _log_ratios(problem, outside))


def _forward_start(problem: Problem) -> Array:
    return problem.masses / jnp.sum(problem.masses)


def _forward_pass(problem: Problem, y: Array) -> tuple[Array, Array]:
    u = _over(problem.dustbins, _outside(problem, y))
    completed = problem.masses + y * _dot(u, 1.0 - problem.names)
    new = completed / (jnp.sum(problem.masses) + jnp.sum(problem.dustbins))
    return new, jnp.max(jnp.abs(new - y))


def _forward_solution(problem: Problem, y: Array) -> Array:
    q = problem.sums * _over(y, problem.masses)[problem.patterns]
    return q / jnp.sum(q)


def _reverse_start(problem: Problem) -> Array:
    return jax.nn.log_softmax(problem.log_masses)


def _reverse_pass(problem: Problem, log_y: Array) -> tuple[Array, Array]:
    y, possible = jnp.exp(log_y), jnp.isfinite(problem.log_masses)
    models = jnp.sum(problem.names, axis=0)
    filling = (1.0 - problem.names) * (problem.dustbins > 0)[:, None].astype(y.dtype)
    count = jnp.sum(filling, axis=0)
    t = _log_ratios(problem, _outside(problem, y))
    named, filled = (jnp.where(possible, x, 0.0) for x in (problem.log_masses, log_y))
    mean = (models * named + count * filled - _dot(t, filling)) / (models + count)
    new = jax.nn.log_softmax(jnp.where(possible, mean, -jnp.inf))
    return new, jnp.max(jnp.abs(jnp.exp(new) - y))


def _reverse_solution(problem: Problem, log_y: Array) -> Array:
    rises = jnp.where(jnp.isfinite(log_y), log_y - problem.log_masses, 0.0)
    return jax.nn.softmax(problem.log_means + rises[problem.patterns])


def _forward_dual(problem: Problem) -> Array:
    """(s, u) `[1 + A]` after a pass of the fixed point."""
    y, _ = _forward_pass(problem, _forward_start(problem))
    u = _over(problem.dustbins, _outside(problem, y))
    # The patterns agree on s only at the minimum; the largest keeps every r_p positive.
    s = _over(problem.masses, y) - _dot(u, problem.names)
    return u.at[0].set(jnp.max(jnp.where(problem.masses > 0, s, -jnp.inf)))


def _forward_newton(problem: Problem, dual: Array) -> tuple[Array, Array]:
    r = _dot(dual, problem.names)
    y, outside = _over(problem.masses, r), _over(problem.dustbins, dual)  # Q_m = d_m / u_m
    excess = jnp.sum(y) - 1.0
    misfits = jnp.where(problem.dustbins > 0, outside - _outside(problem, y), 0.0)
    change = _newton_change(problem, _over(y, r), _over(outside, dual), excess, misfits)
    relative = jnp.where(y > 0, -_dot(change, problem.names) / r, 0.0)
    damping = _damping(relative, jnp.where(outside > 0, -change / dual, 0.0))
    return dual + change * damping, _largest(excess, misfits)


def _forward_dual_solution(problem: Problem, dual: Array) -> Array:
    return _forward_solution(problem, _over(problem.masses, _dot(dual, problem.names)))


def _reverse_dual(problem: Problem) -> Array:
    """(s, t) `[1 + A]` after a pass of the fixed point."""
    log_y, _ = _reverse_pass(problem, _reverse_start(problem))
    y = jnp.exp(log_y)
    t = _log_ratios(problem, _outside(problem, y))
    rises = jnp.where(y > 0, log_y - problem.log_masses, 0.0)
    s = jnp.sum(problem.names, axis=0) * rises - _dot(t, problem.names)
    return t.at[0].set(jnp.sum(y * s))  # the patterns agree on s only at the minimum


def _reverse_primal(problem: Problem, dual: Array) -> Array:
    models = jnp.sum(problem.names, axis=0)
    return problem.log_masses + _dot(dual, problem.names) / models


def _reverse_newton(problem: Problem, dual: Array) -> tuple[Array, Array]:
    y, models = jnp.exp(_reverse_primal(problem, dual)), jnp.sum(problem.names, axis=0)
    term = problem.dustbins > 0
    outside = problem.dustbins * jnp.exp(jnp.where(term, dual, 0.0))  # Q_m = d_m exp(t_m)
    excess = 1.0 - jnp.sum(y)
    misfits = jnp.where(term, _outside(problem, y) - outside, 0.0)
    change = _newton_change(problem, y / models, outside, excess, misfits)
    relative = jnp.where(y > 0, _dot(change, problem.names) / models, 0.0)
    damping = _damping(relative, jnp.where(term, change, 0.0))
    return dual + change * damping, _largest(excess, misfits)


def _reverse_dual_solution(problem: Problem, dual: Array) -> Array:
    return _reverse_solution(problem, _reverse_primal(problem, dual))


def _newton_change(
    problem: Problem, curvatures: Array, dustbin_curvatures: Array, excess: Array, misfits: Array
) -> Array:
    """The full step `[1 + A]`; curvatures are those of the patterns `[n]` and dustbins `[1 + A]`.

    The gradient is `excess + misfits`. An unknown without a term does not change.
    """
    free = (problem.dustbins > 0).at[0].set(True)
    hessian = _dot(problem.names * curvatures[None], problem.names.T) + jnp.diag(dustbin_curvatures)
    identity = jnp.eye(len(free), dtype=hessian.dtype)
    hessian = jnp.where(free[:, None] & free[None], hessian, identity)
    scale = jax.lax.rsqrt(jnp.diag(hessian))  # the unknowns may differ by many orders
    ridge = 4 * len(free) * jnp.finfo(hessian.dtype).eps  # above the rounding of a singular one
    factor = jnp.linalg.cholesky(hessian * scale[:, None] * scale[None] + ridge * identity)
    gradient = scale * jnp.where(free, excess + misfits, 0.0)
    return scale * jax.scipy.linalg.cho_solve((factor, True), gradient)


def _damping(*increases: Array) -> Array:
    """1 / (1 + w), see the module; a little less, so that rounding can't make r or u 0."""
    return 1.0 / (1.0 + 1.01 * jnp.maximum(0.0, jnp.max(jnp.concatenate(increases))))


def _largest(excess: Array, misfits: Array) -> Array:
    return jnp.maximum(jnp.abs(excess), jnp.max(jnp.abs(misfits)))


_FIXED_POINT: dict[Direction, Method] = {
    "forward": Method(_forward_start, _forward_pass, _forward_solution),
    "reverse": Method(_reverse_start, _reverse_pass, _reverse_solution),
}
_NEWTON: dict[Direction, Method] = {
    "forward": Method(_forward_dual, _forward_newton, _forward_dual_solution, start_passes=1),
    "reverse": Method(_reverse_dual, _reverse_newton, _reverse_dual_solution, start_passes=1),
}
