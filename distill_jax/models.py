"""Networks as pairs of pure functions; the only file that knows flax.

A model is in evaluation mode unless it is handed a dropout key, so a teacher can't be left in
train mode by forgetting a flag.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

Params = Any  # a nested dict of arrays


class Model(NamedTuple):
    """A network without state.

    init: `(key, inputs [B, ...]) -> params`; only the inputs' shape matters.
    apply: `(params, inputs [B, ...], dropout_key=None) -> logits [B, C]` float32. Without a key
        nothing is dropped.
    """

    init: Callable[[Array, Array], Params]
    apply: Callable[..., Array]


def mlp(
    hidden: Sequence[int],
    num_classes: int,
    input_dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    dtype: Any = jnp.float32,
    byte: tuple[float, float] = (0.0, 255.0),
) -> Model:
    """A plain ReLU network on flattened inputs (section 3's 784-1200-1200-10).

    Weights start He-normal, biases at 0.

    Args:
        hidden: units of each hidden layer.
        num_classes: C.
        input_dropout: share of the inputs dropped in training, 0..1.
        hidden_dropout: share of every hidden layer's units dropped in training.
        dtype: of the arithmetic; the parameters and the logits stay float32.
        byte: (zero, unit) of uint8 inputs, which stand for `(x - zero) / unit`; as it is, for 0..1.
    """
    net = _MLP(tuple(hidden), num_classes, input_dropout, hidden_dropout, dtype, byte)

    def init(key: Array, inputs: Array) -> Params:
        return net.init(key, inputs)["params"]

    def apply(params: Params, inputs: Array, dropout_key: Array | None = None) -> Array:
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        logits = net.apply({"params": params}, inputs, rngs=rngs)
        assert isinstance(logits, jax.Array)
        return logits

    return Model(init, apply)


def parameter_count(params: Params) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class _MLP(nn.Module):
    hidden: tuple[int, ...]
    num_classes: int
    input_dropout: float
    hidden_dropout: float
    dtype: Any
    byte: tuple[float, float]

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        x = inputs.reshape(inputs.shape[0], -1)
        integer = x.dtype == jnp.uint8
        x = x.astype(self.dtype)
        if integer:
            zero, unit = self.byte
            x = (x - zero) / unit
        x = self._drop(x, self.input_dropout)
        for i, units in enumerate(self.hidden):
            x = nn.Dense(
                units,
                dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(),
                name=f"hidden_{i}",
            )(x)
            x = self._drop(nn.relu(x), self.hidden_dropout)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="output")(x).astype(jnp.float32)

    def _drop(self, x: Array, rate: float) -> Array:
        if rate == 0.0 or not self.has_rng("dropout"):
            return x
        return dropout(self.make_rng("dropout"), x, rate)


def dropout(key: Array, x: Array, rate: float) -> Array:
    """Zeroes a share of `x` `[..., units]` and scales up the rest, with a random byte per value.

    The generator hashes once per number drawn, however narrow, so each 32-bit word serves four units:
    a fifth of a large net's step on a CPU is saved. The rate is rounded to 1/256, and the scale is
    exact for the rounded rate.
    """
    kept = round((1.0 - rate) * 256)
    if kept == 256:
        return x
    units = x.shape[-1]
    words = jax.random.bits(key, (*x.shape[:-1], -(-units // 4)), jnp.uint32)
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., :units]
    scaled = x * jnp.asarray(256 / max(kept, 1), x.dtype)
    return jnp.where(octets < jnp.uint8(kept), scaled, jnp.zeros((), x.dtype))
