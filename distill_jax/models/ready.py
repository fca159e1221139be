"""Models that a net's folder describes, so that they are made again without any code of the user's."""

import dataclasses
import functools
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import ranges
from distill_jax.errors import UserError
from distill_jax.models.linen import from_linen
from distill_jax.models.model import Model, chain
from distill_jax.models.modules import MLP, Activation, Trunk

ACTIVATIONS: Mapping[str, Activation] = types.MappingProxyType(
    {"relu": jax.nn.relu, "gelu": jax.nn.gelu}
)
"""Those that a description can name."""


def mlp(
    hidden: Sequence[int],
    num_classes: int,
    *,
    input_dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    dtype: Any = jnp.float32,
    scaling: tuple[float, float] = (0.0, 255.0),
    activation: Activation = jax.nn.relu,
    output_scale: float = 1.0,
) -> Model:
    """A plain network on flattened inputs (section 3's 784-1200-1200-10).

    Hidden weights start He-normal, those of the output layer LeCun-normal, biases at 0.

    Args:
        hidden: units of each hidden layer.
        num_classes: C.
        input_dropout: share of the inputs dropped in training, 0..1.
        hidden_dropout: share of every hidden layer's units dropped in training.
        dtype: of the arithmetic; the parameters and the logits stay float32.
        scaling: (zero, unit) of uint8 inputs, which stand for `(x - zero) / unit`; by default 0..1.
        activation: of the hidden layers.
        output_scale: on the standard deviation of the output layer's first weights. Where few units
            serve a thousand classes, a small one shortens the plateau that training begins with.

    Raises:
        UserError: for sizes or shares that are none; when applied, for inputs that are neither uint8 nor
            floating point.
    """
    ranges.check(
        hidden=tuple(hidden),
        num_classes=num_classes,
        input_dropout=input_dropout,
        hidden_dropout=hidden_dropout,
    )
    ranges.check_value("output_scale", output_scale, ranges.at_least(0))
    return _as_model(
        MLP(
            tuple(map(int, hidden)),
            int(num_classes),
            input_dropout,
            hidden_dropout,
            jnp.dtype(dtype),
            _pair(scaling),
            activation,
            output_scale,
        )
    )


def conv_trunk(
    channels: Sequence[int],
    strides: Sequence[int],
    *,
    dtype: Any = jnp.float32,
    scaling: tuple[float, float] = (0.0, 255.0),
    activation: Activation = jax.nn.gelu,
) -> Model:
    """Convolutions that turn images into flat features for a head (`chain`).

    Layer i is named conv_i, has kernels of twice its stride with half a stride of padding, and starts
    He-normal. Each is a product of patches with a matrix: XLA's convolution inside a loop, which a
    scanned epoch is, runs 60 times slower on a CPU, and under vmap each member's would be a group.

    Args:
        channels: of each layer.
        strides: of each layer, even and above 0; their product divides the images' sides.
        dtype: of the arithmetic and of the features.
        scaling: as for `mlp`.
        activation: of each layer.

    Returns:
        A model whose "logits" are the features `[B, D]`, of images `[B, H, W]` or `[B, H, W, colours]`.

    Raises:
        UserError: if there aren't as many strides as channels, or one is odd or below 1; when applied,
            for images whose sides the strides don't divide, and as `mlp`.
    """
    ranges.check_value("channels", tuple(channels), ranges.several(ranges.count()))
    if len(channels) != len(strides) or any(s < 1 or s % 2 for s in strides):
        raise UserError(
            f"channels {tuple(channels)} need as many strides, all even and above 0, "
            f"not {tuple(strides)}"
        )
    return _as_model(
        Trunk(
            tuple(map(int, channels)),
            tuple(map(int, strides)),
            jnp.dtype(dtype),
            _pair(scaling),
            activation,
        )
    )


def build(description: str) -> Model:
    """The model of a description; the same object for the same one.

    Raises:
        UserError: for a kind or an activation that this version doesn't know.
    """
    fields = json.loads(description)
    kind = fields.pop("kind")
    if kind == "chain":
        return chain(*(build(json.dumps(part)) for part in fields["parts"]))
    if kind not in _KINDS or fields["activation"] not in ACTIVATIONS:
        raise UserError(
            f"no model of kind {kind!r} with activation {fields.get('activation')!r} is known, only "
            f"{', '.join(_KINDS)} and chain, with {', '.join(ACTIVATIONS)}"
        )
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    fields["dtype"] = jnp.dtype(fields["dtype"])
    fixed = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return _as_model(_KINDS[kind](**fixed))


@functools.cache
def _as_model(net: MLP | Trunk) -> Model:
    """The functions of a module: the same ones for equal modules, so that they are compiled once.

    They have no state: their training mode is `apply` with a key.
    """
    hidden = "hidden_activations" if isinstance(net, MLP) else None
    return from_linen(net, hidden=hidden)._replace(train=None, description=_describe(net))


def _pair(scaling: tuple[float, float]) -> tuple[float, float]:
    zero, unit = scaling
    ranges.check_value("the zero of scaling", zero, ranges.any_number())
    ranges.check_value("the unit of scaling", unit, ranges.above(0))
    return float(zero), float(unit)


def _describe(net: MLP | Trunk) -> str:
    """JSON of a module's fields; "" if its activation has no name."""
    names = [name for name, function in ACTIVATIONS.items() if function is net.activation]
    if not names:
        return ""
    kind = next(kind for kind, module in _KINDS.items() if isinstance(net, module))
    own = {field.name for field in dataclasses.fields(net)} - {"parent", "name"}
    fields = {name: getattr(net, name) for name in sorted(own)}
    return json.dumps({"kind": kind, **fields, "activation": names[0], "dtype": net.dtype.name})


_KINDS: Mapping[str, Any] = types.MappingProxyType({"mlp": MLP, "conv_trunk": Trunk})
