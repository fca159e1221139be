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


def mean_log_probs(member_logits: Array, temperature: ArrayLike, mean: Mean) -> Array:
    """The logarithm of the members' mean distribution at a temperature, in log space (section 1).

    Args:
        member_logits: `[M, ..., C]`.
        temperature: scalar above 0.
        mean: of the probabilities (arithmetic) or of their logarithms, renormalised (geometric).

    Returns:
        `[..., C]` float32.

    Raises:
        UserError: for another mean.

    Examples:
        >>> members = jnp.array([[2.0, 0.0], [0.0, 2.0]])  # [M, C]
        >>> print(jnp.exp(mean_log_probs(members, 1.0, "geometric")))
        [0.5 0.5]
    """
    shapes.check(member_logits=(member_logits, "float M ... C"))
    check_mean(mean)
    log_probs = losses.log_softmax(member_logits, temperature)
    if mean == "arithmetic":
        return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(jnp.float32(len(member_logits)))
    return jax.nn.log_softmax(jnp.mean(log_probs, axis=0))


def mean_probs(member_logits: Array, temperature: ArrayLike, mean: Mean) -> Array:
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
        return jnp.mean(losses.softmax(member_logits, temperature), axis=0)
    return jnp.exp(mean_log_probs(member_logits, temperature, mean))


def mean_probs_of_hidden(hidden: Array, layer: Params, temperature: ArrayLike, mean: Mean) -> Array:
    """The mean distribution of members who are given by their last hidden layers.

    One member's logits are computed after the other, so that they are never all in memory.

    Args:
        hidden: `[B, M, D]`, activations of each member; the products take its dtype.
        layer: {"kernel" `[M, D, C]`, "bias" `[M, C]`}, the members' output layers; the bias may be left
            out.
        temperature: scalar above 0.
        mean: as for `mean_log_probs`.

    Returns:
        `[B, C]` float32 probabilities.

    Raises:
        UserError: for another mean.

    Examples:
        >>> layer = {"kernel": jnp.ones((3, 4, 2)), "bias": jnp.zeros((3, 2))}
        >>> print(mean_probs_of_hidden(jnp.ones((1, 3, 4)), layer, 2.0, "arithmetic"))
        [[0.5 0.5]]
    """
    _, members, size = shapes.check(hidden=(hidden, "float B M D")).values()
    own = {"bias": f"float {members} C"} if "bias" in layer else {}
    shapes.check_fields(layer, "the layer", kernel=f"float {members} {size} C", **own)

    def add(total: Array, member: tuple[Array, Array, Array]) -> tuple[Array, None]:
        activations, kernel, bias = member
        kernel = kernel.astype(activations.dtype)
        logits = jnp.matmul(activations, kernel, preferred_element_type=jnp.float32)
        logits = logits + bias.astype(jnp.float32)[None]
        term = losses.softmax if mean == "arithmetic" else losses.log_softmax
        return total + term(logits, temperature), None

    check_mean(mean)
    count, kernel = hidden.shape[1], layer["kernel"]
    zeros = jnp.zeros((len(hidden), kernel.shape[-1]), jnp.float32)
    bias = layer.get("bias", jnp.zeros(kernel.shape[::2]))
    members = (jnp.moveaxis(hidden, 1, 0), kernel, bias)
    total, _ = jax.lax.scan(add, zeros, members)
    return total / count if mean == "arithmetic" else losses.softmax(total / count)


def ensemble_logits(member_logits: Array, temperature: ArrayLike, mean: Mean) -> Array:
    """Logits v of one teacher such that `softmax(v / T)` is the members' mean at T (shapes as above).

    Examples:
        >>> members = jnp.array([[4.0, 0.0], [2.0, 0.0]])
        >>> v = ensemble_logits(members, 2.0, "arithmetic")
        >>> print(losses.softmax(v, 2.0) - mean_probs(members, 2.0, "arithmetic"))
        [0. 0.]
    """
    return mean_log_probs(member_logits, temperature, mean) * temperature


def check_mean(mean: str) -> None:
    """Raises a UserError if it is neither "arithmetic" nor "geometric"."""
    if mean not in ("arithmetic", "geometric"):
        raise UserError(f"mean must be 'arithmetic' or 'geometric', not {mean!r}")


def logits_over(
    apply: Callable[[Params, Array], Array],
    params: Params,
    inputs: Any,
    batch_size: int = 1000,
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
    logits = np.asarray(_map_batches(apply, params, batches), np.float32)
    if logits.ndim < 3 or logits.shape[1] != batch_size:
        raise UserError(
            f"the model returned {list(logits.shape[1:])} for {batch_size} inputs; expected logits "
            f"[{batch_size}, ..., C]"
        )
    return logits.reshape(-1, *logits.shape[2:])[:size]


@functools.partial(jax.jit, static_argnums=0)
def _map_batches(apply: Callable[[Params, Any], Array], params: Params, batches: Any) -> Array:
    return jax.lax.map(lambda batch: apply(params, batch), batches)
