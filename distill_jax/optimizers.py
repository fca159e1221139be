"""Optimizers as optax transforms.

Every optimizer here takes its learning rate as an extra argument of `update`, a traced scalar, so
that members with different learning rates train under one `vmap`:
`optimizer.update(grads, opt_state, params, learning_rate=0.1)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

OUTPUT_LAYER = "output"  # the name of the softmax layer in every model of distill_jax.models


def sgd(
    schedule: optax.Schedule, momentum: float = 0.9, max_norm: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent with Nesterov momentum.

    Args:
        schedule: step -> the factor on `learning_rate`, such as `cosine(...)`.
        momentum: decay of the gradient trace, 0..1.
        max_norm: if above 0, the longest incoming weight vector of a hidden unit.
    """
    return _chain(optax.trace(momentum, nesterov=True), schedule, max_norm)


def adam(schedule: optax.Schedule, max_norm: float = 0.0) -> optax.GradientTransformationExtraArgs:
    """Adam with optax's defaults; arguments as for `sgd`."""
    return _chain(optax.scale_by_adam(), schedule, max_norm)


def dropout_2012(
    steps_per_epoch: int, max_norm: float = 15.0**0.5
) -> optax.GradientTransformationExtraArgs:
    """The recipe of Hinton et al. 2012 (arXiv 1207.0580, appendix A), the paper's reference [5].

    `v <- m v - (1 - m) e g`, `w <- w + v`, where the momentum m rises from 0.5 to 0.99 over 500
    epochs and the rate e is `learning_rate * 0.998^epoch` (theirs starts at 10). The gradient is
    scaled before it enters the trace. Their limit of 15 is on the *squared* length of a unit's
    incoming weights; `max_norm` here is the length, hence the square root.
    """

    def init(params: optax.Params) -> _MomentumState:
        return _MomentumState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(
        grads: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        learning_rate: Array,
        **_: Array,
    ) -> tuple[optax.Updates, optax.OptState]:
        assert isinstance(state, _MomentumState)
        epoch = state.steps.astype(jnp.float32) / steps_per_epoch
        momentum = jnp.minimum(0.5 + epoch / 500.0 * (0.99 - 0.5), 0.99)
        rate = (1.0 - momentum) * learning_rate * 0.998**epoch
        trace = jax.tree.map(lambda v, g: momentum * v - rate * g, state.trace, grads)
        return trace, _MomentumState(state.steps + 1, trace)

    return optax.chain(optax.GradientTransformationExtraArgs(init, update), _hidden_only(max_norm))


def limit_incoming_weights(max_norm: float) -> optax.GradientTransformation:
    """Scales back the weights into a unit whose length would exceed `max_norm` after the update.

    The weight constraint of Hinton et al. 2012: a limit on the L2 norm of each hidden unit's
    incoming weight vector, in place of a penalty. It must stand last in a chain, where the updates
    are what will be added to the parameters. A kernel is `[inputs, units]`; other ranks pass.
    """

    def project(update: Array, kernel: Array) -> Array:
        if kernel.ndim != 2:
            return update
        moved = kernel + update
        # 1e-12 keeps 0 / 0 away from a unit whose weights are all zero.
        length = jnp.sqrt(jnp.sum(jnp.square(moved), axis=0, keepdims=True) + 1e-12)
        return moved * jnp.minimum(1.0, max_norm / length) - kernel

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.tree.map(project, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def cosine(steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Linear warm-up from 0 to 1, then half a cosine down to 0 at `steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps, steps)


def scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by `-learning_rate * schedule(step)`, the rate being an extra argument."""

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        learning_rate: Array,
        **_: Array,
    ) -> tuple[optax.Updates, optax.OptState]:
        assert isinstance(state, optax.ScaleByScheduleState)
        rate = -learning_rate * schedule(state.count)
        return jax.tree.map(lambda u: rate * u, updates), optax.ScaleByScheduleState(
            count=state.count + 1
        )

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32)), update
    )


class _MomentumState(NamedTuple):
    steps: Array
    trace: optax.Updates


def _chain(
    direction: optax.GradientTransformation, schedule: optax.Schedule, max_norm: float
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(direction, scale_by_learning_rate(schedule), _hidden_only(max_norm))


def _hidden_only(max_norm: float) -> optax.GradientTransformation:
    """The limit on hidden units, not on the softmax layer; nothing at all for `max_norm` 0."""
    if max_norm <= 0:
        return optax.identity()
    return optax.masked(
        limit_incoming_weights(max_norm),
        lambda params: {name: name != OUTPUT_LAYER for name in params},
    )
