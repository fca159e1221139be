"""What a teacher or an ensemble of teachers predicts: means of distributions, logits over a data set."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import losses, ranges, shapes
from distill_jax.batches import count_rows
from distill_jax.errors import UserError
from distill_jax.models import Params

Mean = Literal["arithmetic", "geometric"]
BATCH_SIZE = 1000
"""Examples whose logits are made at a time."""


def mean_log_probs(
    member_logits: Array, temperature: ArrayLike, mean: Mean, weights: ArrayLike | None = None
) -> Array:
    """The logarithm of the members' mean distribution at a temperature, in log space (section 1).

    Args:
        member_logits: `[M, ..., C]`.
        temperature: scalar above 0.
        mean: of the probabilities (arithmetic) or of their logarithms, renormalised (geometric).
        weights: `[M]`, or `[..., M]` for each example its own; at least 0, and not all 0. They are
            divided by their sum. None: all members count the same.

    Returns:
        `[..., C]` float32.

    Raises:
        UserError: for another mean, or weights that aren't such; traced ones give NaN.

    Examples:
        >>> members = jnp.array([[2.0, 0.0], [0.0, 2.0]])  # [M, C]
        >>> print(jnp.exp(mean_log_probs(members, 1.0, "geometric")))
        [0.5 0.5]
    """
    shapes.check(member_logits=(member_logits, "float M ... C"))
    check_mean(mean)
    log_probs = losses.log_softmax(member_logits, temperature)
    if mean == "geometric":
        return jax.nn.log_softmax(weighted_mean(log_probs, weights))
    if weights is None:
        return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(jnp.float32(len(member_logits)))
    return jax.nn.logsumexp(log_probs, axis=0, b=_shares(weights, member_logits.shape))


def mean_probs(
    member_logits: Array, temperature: ArrayLike, mean: Mean, weights: ArrayLike | None = None
) -> Array:
    """The members' mean distribution itself; arguments and errors as for `mean_log_probs`.

    An arithmetic mean takes a tenth of the time that its logarithm takes on a CPU; a probability below
    the smallest float32 is 0.

    Examples:
        >>> members = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))  # [M, C]
        >>> for mean in ("arithmetic", "geometric"):
        ...     print(f"{mean}: {mean_probs(members, 1.0, mean)[0]:.3f}")
        arithmetic: 0.700
        geometric: 0.750
    """
    shapes.check(member_logits=(member_logits, "float M ... C"))
    if mean == "arithmetic":
        return weighted_mean(losses.softmax(member_logits, temperature), weights)
    return jnp.exp(mean_log_probs(member_logits, temperature, mean, weights))


def mean_probs_of_hidden(
    hidden: Array,
    layer: Params,
    temperature: ArrayLike,
    mean: Mean,
    weights: ArrayLike | None = None,
) -> Array:
    """The mean distribution of members who are given by their last hidden layers.

    One member's logits are computed after the other, so that they are never all in memory.

    Args:
        hidden: `[B, M, D]`, activations of each member; the products take its dtype.
        layer: {"kernel" `[M, D, C]`, "bias" `[M, C]`}, the members' output layers; the bias may be left
            out.
        temperature: scalar above 0.
        mean, weights: as for `mean_log_probs`; `[M]` or `[B, M]`.

    Returns:
        `[B, C]` float32 probabilities.

    Raises:
        UserError: as `mean_log_probs`.

    Examples:
        >>> layer = {"kernel": jnp.ones((3, 4, 2)), "bias": jnp.zeros((3, 2))}
        >>> print(mean_probs_of_hidden(jnp.ones((1, 3, 4)), layer, 2.0, "arithmetic"))
        [[0.5 0.5]]
    """
    _, members, size = shapes.check(hidden=(hidden, "float B M D")).values()
    own = {"bias": f"float {members} C"} if "bias" in layer else {}
    shapes.check_fields(layer, "the layer", kernel=f"float {members} {size} C", **own)

    def add(total: Array, member: tuple[Array, Array, Array, Any]) -> tuple[Array, None]:
        activations, kernel, bias, share = member
        kernel = kernel.astype(activations.dtype)
        logits = jnp.matmul(activations, kernel, preferred_element_type=jnp.float32)
        logits = logits + bias.astype(jnp.float32)[None]
        term = losses.softmax if mean == "arithmetic" else losses.log_softmax
        values = term(logits, temperature)
        return total + (values if share is None else _weighed(values, share)), None

    check_mean(mean)
    kernel, count = layer["kernel"], 1 if weights is not None else hidden.shape[1]
    zeros = jnp.zeros((len(hidden), kernel.shape[-1]), jnp.float32)
    bias = layer.get("bias", jnp.zeros(kernel.shape[::2]))
    shape = (members, len(hidden), kernel.shape[-1])
    shares = None if weights is None else _shares(weights, shape)
    each = (jnp.moveaxis(hidden, 1, 0), kernel, bias, shares)
    total, _ = jax.lax.scan(add, zeros, each)
    return total / count if mean == "arithmetic" else losses.softmax(total / count)


def ensemble_logits(
    member_logits: Array, temperature: ArrayLike, mean: Mean, weights: ArrayLike | None = None
) -> Array:
    """Logits v of one teacher such that `softmax(v / T)` is the members' mean at T (shapes as above).

    Examples:
        >>> members = jnp.array([[4.0, 0.0], [2.0, 0.0]])
        >>> v = ensemble_logits(members, 2.0, "arithmetic")
        >>> print(losses.softmax(v, 2.0) - mean_probs(members, 2.0, "arithmetic"))
        [0. 0.]
    """
    return mean_log_probs(member_logits, temperature, mean, weights) * temperature


def weighted_mean(values: Array, weights: ArrayLike | None) -> Array:
    """The members' mean of any values, such as their logits.

    Args:
        values: `[M, ..., C]`.
        weights: as for `mean_log_probs`. What weighs 0 may be infinite.

    Returns:
        `[..., C]` float32.

    Examples:
        >>> print(weighted_mean(jnp.array([[1.0, 2.0], [3.0, 6.0]]), [3.0, 1.0]))
        [1.5 3. ]
    """
    if weights is None:
        return jnp.mean(values, axis=0)
    return jnp.sum(_weighed(values, _shares(weights, values.shape)), axis=0)


def _weighed(values: Array, share: Array) -> Array:
    """Their product, 0 where the share is."""
    share = jnp.broadcast_to(share, values.shape)
    return jnp.where(share == 0, 0.0, share * values)


def _shares(weights: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Members' weights with sum 1, float32 `[M, ..., 1]`, for values of a shape `[M, ..., C]`."""
    weights = check_weights(weights, shape[0], shape[1:-1])
    weights = jnp.moveaxis(weights.astype(jnp.float32), -1, 0)
    total = jnp.sum(weights, axis=0, keepdims=True)
    sound = (total > 0) & jnp.all(weights >= 0, axis=0, keepdims=True)
    shares = weights / jnp.where(sound, total, jnp.nan)
    return shares.reshape(shares.shape + (1,) * (len(shape) - shares.ndim))


def check_weights(weights: Any, members: int, leading: tuple[int, ...]) -> Array:
    """Members' weights as an array `[M]`, or `[..., M]` of examples `[...]`.

    Raises:
        UserError: for another shape, one below 0, or weights of an example that are all 0.

    Examples:
        >>> check_weights([0.0, 0.0], 2, (10,))
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: the sum of an example's weights is 0.0; allowed: above 0, finite
    """
    try:
        array = jnp.asarray(weights)
    except (TypeError, ValueError) as error:
        raise UserError(f"weights are {weights!r}; expected numbers") from error
    is_real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.shape not in ((members,), (*leading, members)) or not is_real:
        raise UserError(
            f"weights are {shapes.describe(array)}; expected numbers [{members}], one for each member, "
            f"or {[*leading, members]}"
        )
    ranges.check_value("a member's weight", array, ranges.at_least(0))
    sums = jnp.sum(array.astype(jnp.float32), axis=-1)
    ranges.check_value("the sum of an example's weights", sums, ranges.above(0))
    return array


def check_mean(mean: str) -> None:
    """Raises a UserError if it is neither "arithmetic" nor "geometric"."""
    if mean not in ("arithmetic", "geometric"):
        raise UserError(f"mean must be 'arithmetic' or 'geometric', not {mean!r}")


def logits_over(
    apply: Callable[[Params, Array], Array],
    params: Params,
    inputs: Any,
    batch_size: int = BATCH_SIZE,
) -> np.ndarray:
    """A frozen teacher's logits over a whole data set, in one jitted pass.

    Args:
        apply: `(params, inputs [B, ...]) -> logits [B, C]`, in evaluation mode; or `[B, T, C]` of
            sequences.
        params: the teacher's, or a whole ensemble's if `apply` takes that.
        inputs: `[N, ...]`, or a tree of such arrays.
        batch_size: examples in memory at a time.

    Returns:
        float32 `[N, C]`, or `[N, T, C]`, on the host.

    Raises:
        UserError: without any inputs, for a batch size below 1, or if `apply` doesn't return a row for
            each example.

    Examples:
        >>> logits_over(lambda scale, inputs: scale * inputs, 2.0, np.ones((3, 2)), batch_size=2)
        array([[2., 2.],
               [2., 2.],
               [2., 2.]], dtype=float32)
    """
    size = count_rows(inputs)
    ranges.check(batch_size=batch_size)
    batch_size = min(batch_size, size)

    def cut(leaf: np.ndarray) -> np.ndarray:
        # Filled up with the last example, which the model takes; it might not take zeros.
        padding = [(0, -size % batch_size)] + [(0, 0)] * (leaf.ndim - 1)
        return np.pad(leaf, padding, "edge").reshape(-1, batch_size, *leaf.shape[1:])

    batches = jax.tree.map(cut, inputs)
    logits = np.asarray(map_batches(apply, params, batches), np.float32)
    if logits.ndim < 3 or logits.shape[1] != batch_size:
        raise UserError(
            f"the model returned {list(logits.shape[1:])} for {batch_size} inputs; expected logits "
            f"[{batch_size}, ..., C]"
        )
    return logits.reshape(-1, *logits.shape[2:])[:size]


@functools.partial(jax.jit, static_argnums=0)
def map_batches(apply: Callable[[Params, Any], Array], params: Params, batches: Any) -> Array:
    """The program of `logits_over`: `apply` on one batch after the other, `[batches, B, ...]`."""
    return jax.lax.map(lambda batch: apply(params, batch), batches)
