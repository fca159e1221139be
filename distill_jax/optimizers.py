"""Optimizers as optax transforms.

The learning rate is an extra argument of `update`, a traced scalar, so that members with different
learning rates train under one `vmap`:
`optimizer.update(grads, opt_state, params, learning_rate=0.1)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from distill_jax import layers, ranges


def sgd(
    schedule: optax.Schedule,
    momentum: float = 0.9,
    max_norm: float = 0.0,
    output: str = layers.OUTPUT,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent with Nesterov momentum.

    Args:
        schedule: step -> factor on `learning_rate`, such as `cosine(...)`.
        momentum: decay of the gradient trace, 0..1.
        max_norm: if above 0, the limit on the L2 norm of a hidden unit's incoming weights.
        output: the name of the softmax layer, which is not limited, at any depth of the parameters.

    Raises:
        UserError: for a momentum or a limit that is none; from `init`, if there is a limit and no layer
            of that name.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from distill_jax import optimizers
        >>> optimizer = optimizers.sgd(optax.constant_schedule(1.0), momentum=0.0)
        >>> params, grads = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.5, -1.0])}
        >>> updates, _ = optimizer.update(
        ...     grads, optimizer.init(params), params, learning_rate=0.1
        ... )
        >>> print(optax.apply_updates(params, updates)["w"])
        [0.95 2.1 ]
    """
    ranges.check(momentum=momentum)
    return _chain(optax.trace(momentum, nesterov=True), schedule, max_norm, output)


def adam(
    schedule: optax.Schedule, max_norm: float = 0.0, output: str = layers.OUTPUT
) -> optax.GradientTransformationExtraArgs:
    """Adam with optax's defaults; arguments and errors as for `sgd`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import optimizers
        >>> optimizer = optimizers.adam(optimizers.cosine(steps=100))
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> updates, _ = optimizer.update(
        ...     params, optimizer.init(params), params, learning_rate=0.1
        ... )
        >>> print(updates["w"])
        [-0.1 -0.1]
    """
    return _chain(optax.scale_by_adam(), schedule, max_norm, output)


def dropout_2012(
    steps_per_epoch: int, max_norm: float = 15.0**0.5, output: str = layers.OUTPUT
) -> optax.GradientTransformationExtraArgs:
    """The recipe of Hinton et al. 2012 (arXiv 1207.0580, appendix A), the paper's reference [5].

    `v <- m v - (1 - m) e g`, `w <- w + v`, where the momentum m rises from 0.5 to 0.99 over 500
    epochs and the rate e is `learning_rate * 0.998^epoch` (in the recipe the first rate is 10). The
    gradient is scaled before it enters the trace.

    Args:
        steps_per_epoch: batches in an epoch.
        max_norm: as for `sgd`. The recipe's limit of 15 is on the *squared* norm, hence the root.
        output: as for `sgd`.

    Raises:
        UserError: as `sgd`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from distill_jax import optimizers
        >>> optimizer = optimizers.dropout_2012(steps_per_epoch=600)
        >>> params = {"output": {"kernel": jnp.eye(2)}}
        >>> updates, _ = optimizer.update(
        ...     params, optimizer.init(params), params, learning_rate=10.0
        ... )
        >>> print(updates["output"]["kernel"])
        [[-5.  0.]
         [ 0. -5.]]
    """

    ranges.check_value("steps_per_epoch", steps_per_epoch, ranges.above(0))

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
        trace = jax.tree.map(lambda v, g: momentum * _wide(v) - rate * _wide(g), state.trace, grads)
        kept = jax.tree.map(lambda v, old: v.astype(old.dtype), trace, state.trace)
        return trace, _MomentumState(state.steps + 1, kept)

    moved = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(moved, _hidden_only(max_norm, output))


def limit_incoming_weights(max_norm: float) -> optax.GradientTransformation:
    """Limits the L2 norm of each unit's incoming weights to `max_norm` after the update.

    The weight constraint of Hinton et al. 2012, which replaces a penalty. It must be last in a chain,
    where the updates are what will be added to the parameters. A kernel is `[inputs, units]`; arrays of
    other ranks are not limited.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from distill_jax import optimizers
        >>> limit = optimizers.limit_incoming_weights(max_norm=1.0)
        >>> kernel = jnp.array([[0.6, 3.0], [0.0, 4.0]])
        >>> updates, _ = limit.update(jnp.zeros((2, 2)), limit.init(kernel), kernel)
        >>> print(kernel + updates)
        [[0.6 0.6]
         [0. 0.8]]
    """

    def project(update: Array, kernel: Array) -> Array:
        if kernel.ndim != 2:
            return update
        moved = _wide(kernel) + _wide(update)
        # 1e-12 avoids 0 / 0 for a unit whose weights are all zero.
        length = jnp.sqrt(jnp.sum(jnp.square(moved), axis=0, keepdims=True) + 1e-12)
        return moved * jnp.minimum(1.0, max_norm / length) - _wide(kernel)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.tree.map(project, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def cosine(steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Linear warm-up from 0 to 1, then half a cosine down to 0 at `steps`.

    Raises:
        UserError: without steps, or for a warm-up that takes them all.

    Examples:
        >>> from distill_jax import optimizers
        >>> schedule = optimizers.cosine(steps=100, warmup_steps=10)
        >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 55, 100)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    ranges.check_value("steps", steps, ranges.count())
    ranges.check_value("warmup_steps", warmup_steps, ranges.count(0, steps - 1))
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps, steps)


def scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by `-learning_rate * schedule(step)`; the rate is an extra argument.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from distill_jax import optimizers
        >>> scale = optimizers.scale_by_learning_rate(optax.constant_schedule(0.5))
        >>> updates, state = scale.update(jnp.array([1.0]), scale.init(None), learning_rate=0.1)
        >>> print(updates, state.count)
        [-0.05] 1
    """

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
        scaled = jax.tree.map(lambda u: rate * _wide(u), updates)
        return scaled, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32)), update
    )


class _MomentumState(NamedTuple):
    steps: Array
    trace: optax.Updates


def _chain(
    direction: optax.GradientTransformation,
    schedule: optax.Schedule,
    max_norm: float,
    output: str,
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(direction, scale_by_learning_rate(schedule), _hidden_only(max_norm, output))


def _hidden_only(max_norm: float, output: str) -> optax.GradientTransformation:
    """`limit_incoming_weights` for all layers but the softmax layer; no limit for `max_norm` 0."""
    ranges.check(max_norm=max_norm)
    if max_norm == 0:
        return optax.identity()

    def is_hidden(params: optax.Params) -> optax.Params:
        layers.check(params, output)
        return jax.tree.map_with_path(lambda path, _: output not in layers.names(path), params)

    return optax.masked(limit_incoming_weights(max_norm), is_hidden)


def _wide(x: Array) -> Array:
    """In float32 at least: updates of narrow parameters are rounded once, when they are added."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
