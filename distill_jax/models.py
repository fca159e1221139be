"""Networks as pairs of pure functions; the only file that imports flax.

A model is in evaluation mode unless it is handed a dropout key, so a teacher can't be left in
train mode by forgetting a flag.
"""

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jax import Array

from distill_jax import ranges, shapes
from distill_jax.errors import UserError

Params = Any  # a nested dict of arrays
Activation = Callable[[Array], Array]


class Model(NamedTuple):
    """A network without mutable state: what `apply` changes besides its result is lost.

    So the running statistics of BatchNorm are not kept: in evaluation mode they are those of `init`.
    Take a norm that needs none, such as LayerNorm or GroupNorm.

    init: `(key, inputs [B, ...]) -> params`; only the inputs' shape matters.
    apply: `(params, inputs [B, ...], dropout_key=None) -> logits [B, C]` float32. Without a key
        nothing is dropped.
    hidden: the same arguments -> the last hidden layer's activations `[B, D]`, which the layer
        "output" of the params (or `train_step.Fused.output`) makes the logits of, for losses fused with
        it (`fused_loss`). None where there is no such layer.
    description: JSON from which `build` makes the same model again; "" for a model of your own.
    """

    init: Callable[[Array, Array], Params]
    apply: Callable[..., Array]
    hidden: Callable[..., Array] | None = None
    description: str = ""


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
        _MLP(
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
        _Trunk(
            tuple(map(int, channels)),
            tuple(map(int, strides)),
            jnp.dtype(dtype),
            _pair(scaling),
            activation,
        )
    )


@functools.cache
def chain(trunk: Model, head: Model) -> Model:
    """One model of a trunk that makes features and a head that classifies them.

    Their parameters lie side by side in one dict.

    Raises:
        UserError: from `init`, for layers of the same name.
    """

    def init(key: Array, inputs: Array) -> Params:
        trunk_key, head_key = jax.random.split(key)
        params = trunk.init(trunk_key, inputs)
        own = head.init(head_key, trunk.apply(params, inputs))
        if both := sorted(set(params) & set(own)):
            raise UserError(f"trunk and head both have a layer named {both[0]!r}: rename one")
        return {**params, **own}

    def apply(params: Params, inputs: Array, dropout_key: Array | None = None) -> Array:
        return head.apply(params, trunk.apply(params, inputs), dropout_key)

    def hidden(params: Params, inputs: Array, dropout_key: Array | None = None) -> Array:
        assert head.hidden is not None
        return head.hidden(params, trunk.apply(params, inputs), dropout_key)

    parts = [json.loads(part.description or "null") for part in (trunk, head)]
    description = json.dumps({"kind": "chain", "parts": parts}) if all(parts) else ""
    return Model(init, apply, hidden if head.hidden else None, description)


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


def head_params(params: Params) -> Params:
    """The layers of a chained model that come after its trunk, a `conv_trunk`.

    Raises:
        UserError: if the trunk is another model: its layers' names say nothing of which are the head's.
    """
    head = {name: layer for name, layer in params.items() if not name.startswith("conv_")}
    if len(head) == len(params):
        raise UserError(f"no layer is named conv_0, conv_1, ..., only {', '.join(sorted(params))}")
    return head


def parameter_count(params: Params) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@functools.cache
def _as_model(net: "_MLP | _Trunk") -> Model:
    """The functions of a module: the same ones for equal modules, so that they are compiled once."""

    kind = "any B H W *" if isinstance(net, _Trunk) else "any B *"

    def init(key: Array, inputs: Array) -> Params:
        shapes.check(inputs=(inputs, kind))
        return net.init(key, inputs)["params"]

    def run(method: Any, params: Params, inputs: Array, dropout_key: Array | None = None) -> Array:
        shapes.check(inputs=(inputs, kind))
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        try:
            outputs = net.apply({"params": params}, inputs, rngs=rngs, method=method)
        except ScopeParamShapeError as error:
            raise UserError(
                f"inputs are {shapes.describe(inputs)}, which these parameters are not for: {error}"
            ) from error
        assert isinstance(outputs, jax.Array)
        return outputs

    hidden = functools.partial(run, net.hidden_activations) if isinstance(net, _MLP) else None
    return Model(init, functools.partial(run, None), hidden, _describe(net))


def _pair(scaling: tuple[float, float]) -> tuple[float, float]:
    zero, unit = scaling
    ranges.check_value("the zero of scaling", zero, ranges.any_number())
    ranges.check_value("the unit of scaling", unit, ranges.above(0))
    return float(zero), float(unit)


def _describe(net: "_MLP | _Trunk") -> str:
    """JSON of a module's fields; "" if its activation has no name."""
    names = [name for name, function in ACTIVATIONS.items() if function is net.activation]
    if not names:
        return ""
    kind = next(kind for kind, module in _KINDS.items() if isinstance(net, module))
    own = {field.name for field in dataclasses.fields(net)} - {"parent", "name"}
    fields = {name: getattr(net, name) for name in sorted(own)}
    return json.dumps({"kind": kind, **fields, "activation": names[0], "dtype": net.dtype.name})


class _MLP(nn.Module):
    hidden: tuple[int, ...]
    num_classes: int
    input_dropout: float
    hidden_dropout: float
    dtype: Any
    scaling: tuple[float, float]
    activation: Activation
    output_scale: float

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        x = self.hidden_activations(inputs)
        start = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "truncated_normal")
        output = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=start, name="output")
        return output(x).astype(jnp.float32)

    @nn.compact
    def hidden_activations(self, inputs: Array) -> Array:
        x = _from_bytes(inputs.reshape(inputs.shape[0], -1), self.dtype, self.scaling)
        x = self._drop(x, self.input_dropout)
        for i, units in enumerate(self.hidden):
            x = nn.Dense(
                units,
                dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(),
                name=f"hidden_{i}",
            )(x)
            x = self._drop(self.activation(x), self.hidden_dropout)
        return x

    def _drop(self, x: Array, rate: float) -> Array:
        if rate == 0.0 or not self.has_rng("dropout"):
            return x
        return dropout(self.make_rng("dropout"), x, rate)


class _Trunk(nn.Module):
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    scaling: tuple[float, float]
    activation: Activation

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = _from_bytes(images, self.dtype, self.scaling)
        x = x if x.ndim == 4 else x[..., None]
        for i, (channels, stride) in enumerate(zip(self.channels, self.strides, strict=True)):
            layer = nn.Dense(
                channels,
                dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(),
                name=f"conv_{i}",
            )
            x = self.activation(layer(patches(x, stride)))
        return x.reshape(len(x), -1)


_KINDS: Mapping[str, Any] = types.MappingProxyType({"mlp": _MLP, "conv_trunk": _Trunk})


def patches(x: Array, stride: int) -> Array:
    """What a kernel of size 2 x `stride` sees at each of its places.

    Args:
        x: `[B, H, W, c]`; padded by half a stride on all sides.
        stride: even, divides H and W.

    Returns:
        `[B, H / stride, W / stride, 4 * stride^2 * c]`.

    Raises:
        UserError: if it doesn't divide them.
    """
    batch, height, width, channels = x.shape
    if height % stride or width % stride:
        raise UserError(
            f"images of {height} x {width} at a layer of stride {stride}, which must divide both: "
            "choose other strides, or resize the images"
        )
    margin = (stride // 2, stride // 2)
    x = jnp.pad(x, ((0, 0), margin, margin, (0, 0)))
    rows, columns = height // stride + 1, width // stride + 1
    blocks = x.reshape(batch, rows, stride, columns, stride, channels)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
    corners = [blocks[:, i : rows - 1 + i, j : columns - 1 + j] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(corners, axis=-1)


def _from_bytes(x: Array, dtype: Any, scaling: tuple[float, float]) -> Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(dtype)
    if x.dtype != jnp.uint8:
        raise UserError(
            f"inputs are {x.dtype}; expected uint8, which are scaled, or floating point, which are "
            "taken as they are: convert them to one of the two"
        )
    zero, unit = scaling
    return (x.astype(dtype) - zero) / unit


def dropout(key: Array, x: Array, rate: float) -> Array:
    """Zeroes a share of `x` `[..., units]` and scales up the rest, with a random byte per value.

    The generator hashes once per number drawn, however narrow, so each 32-bit word serves four units:
    a fifth of a large net's step on a CPU is saved. The rate is rounded to 1/256, and the scale is
    exact for the rounded rate.

    Raises:
        UserError: for a rate that isn't 0 or more, and less than 1.
    """
    ranges.check_value("the dropout rate", rate, ranges.below(1))
    kept = round((1.0 - rate) * 256)
    if kept == 256:
        return x
    units = x.shape[-1]
    words = jax.random.bits(key, (*x.shape[:-1], -(-units // 4)), jnp.uint32)
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., :units]
    scaled = x * jnp.asarray(256 / max(kept, 1), x.dtype)  # a rate near 1 may keep none
    return jnp.where(octets < jnp.uint8(kept), scaled, jnp.zeros((), x.dtype))
