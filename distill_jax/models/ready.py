"""Models that a net's folder describes, so that they are made again without any code of the user's."""

import dataclasses
import functools
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import ranges
from distill_jax.errors import UserError
from distill_jax.models.linen import from_linen
from distill_jax.models.model import Model, chain
from distill_jax.models.modules import MLP, Activation, Trunk
from distill_jax.models.resnet import STAGES, ResNet, block_names

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
    hidden_scale: float = 1.0,
    gradient_dtype: Any = jnp.float32,
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
        gradient_dtype: that the gradients of the weights have, and are summed in, over examples and
            devices; the parameters stay float32.
        hidden_scale: the same of the hidden layers. Small weights, as in the nets of 2012, let a student
            generalise better from soft targets of few examples.

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
    ranges.check_value("hidden_scale", hidden_scale, ranges.above(0))
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
            hidden_scale,
            jnp.dtype(gradient_dtype),
        )
    )


def conv_trunk(
    channels: Sequence[int],
    strides: Sequence[int],
    *,
    dtype: Any = jnp.float32,
    scaling: tuple[float, float] = (0.0, 255.0),
    activation: Activation = jax.nn.gelu,
    gradient_dtype: Any = jnp.float32,
) -> Model:
    """Convolutions that turn images into flat features for a head (`chain`).

    Layer i is named conv_i, has kernels of twice its stride with half a stride of padding, and starts
    He-normal. On TPUs it is XLA's convolution, elsewhere a product of patches with a matrix, of the same
    parameters: XLA's convolution inside a loop, which a scanned epoch is, runs 60 times slower on a CPU,
    and under vmap each member's would be a group.

    Args:
        channels: of each layer.
        strides: of each layer, even and above 0; their product divides the images' sides.
        dtype: of the arithmetic and of the features.
        scaling: as for `mlp`.
        activation: of each layer.
        gradient_dtype: as for `mlp`.

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
            jnp.dtype(gradient_dtype),
        )
    )


def resnet(
    depth: int,
    num_classes: int,
    *,
    width: int = 16,
    dtype: Any = jnp.float32,
    scaling: tuple[float, float] = (0.0, 255.0),
    gradient_dtype: Any = jnp.float32,
) -> Model:
    """A residual network with BatchNorm for small images (He et al. 2015, section 4.2).

    Three stages of `width`, twice and four times as many channels; shortcuts without parameters. Its
    activations are those after each stage: "block_0_N", "block_1_N", "block_2_N" of the last block N.

    Args:
        depth: weighted layers, 6n + 2: 8, 14, 20 (0.27 million parameters at width 16), 32, 44, 56, 110.
        num_classes: C.
        width: channels of the first stage.
        dtype: of the arithmetic; parameters, statistics and logits stay float32.
        scaling: as for `mlp`.
        gradient_dtype: as for `mlp`.

    Returns:
        A model with state, of images `[B, H, W]` or `[B, H, W, colours]`; "hidden" are the means over
        all places, `[B, 4 * width]`.

    Raises:
        UserError: for another depth or sizes that are none; when applied, as `mlp`.

    Examples:
        >>> from distill_jax import models
        >>> images = jnp.zeros((1, 8, 8, 3), jnp.uint8)
        >>> shapes = jax.eval_shape(models.resnet(20, 10).init, jax.random.key(0), images)
        >>> models.parameter_count(shapes.params)
        269722
    """
    words = "6n + 2 for a whole number n above 0, such as 8, 14 or 20"
    depths = ranges.Allowed(words, lambda x: ranges.count(8).accepts(x) and x % 6 == 2)
    ranges.check_value("depth", depth, depths)
    ranges.check_value("width", width, ranges.count())
    ranges.check(num_classes=num_classes)
    return _as_model(
        ResNet(
            int(depth),
            int(num_classes),
            int(width),
            jnp.dtype(dtype),
            _pair(scaling),
            jnp.dtype(gradient_dtype),
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
    if kind not in _KINDS or fields.get("activation", "relu") not in ACTIVATIONS:
        raise UserError(
            f"no model of kind {kind!r} with activation {fields.get('activation')!r} is known, only "
            f"{', '.join(_KINDS)} and chain, with {', '.join(ACTIVATIONS)}"
        )
    if "activation" in fields:
        fields["activation"] = ACTIVATIONS[fields["activation"]]
    for name in fields.keys() & {"dtype", "gradient_dtype"}:
        fields[name] = jnp.dtype(fields[name])
    fixed = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return _as_model(_KINDS[kind](**fixed))


def gradient_dtype(model: Model) -> Any:
    """The dtype that all layers' gradients have; None if they differ, and of a model of your own.

    Examples:
        >>> from distill_jax import models
        >>> print(models.gradient_dtype(models.mlp((8,), 3)))
        float32
    """
    fields = json.loads(model.description or "null")
    if fields is None:
        return None
    found = {part.get("gradient_dtype", "float32") for part in fields.get("parts", [fields])}
    return jnp.dtype(found.pop()) if len(found) == 1 else None


@functools.cache
def _as_model(net: MLP | Trunk | ResNet) -> Model:
    """The functions of a module: the same ones for equal modules, so that they are compiled once."""
    if isinstance(net, ResNet):
        names = block_names(net.depth)
        last = names[len(names) // STAGES - 1 :: len(names) // STAGES]
        model = from_linen(net, hidden="hidden_activations", activations=last)
    else:  # without state, so that training mode is `apply` with a key
        hidden = "hidden_activations" if isinstance(net, MLP) else None
        model = from_linen(net, hidden=hidden)._replace(train=None)
    return model._replace(description=_describe(net))


def _pair(scaling: tuple[float, float]) -> tuple[float, float]:
    zero, unit = scaling
    ranges.check_value("the zero of scaling", zero, ranges.any_number())
    ranges.check_value("the unit of scaling", unit, ranges.above(0))
    return float(zero), float(unit)


def _describe(net: MLP | Trunk | ResNet) -> str:
    """JSON of a module's fields but those at their defaults; "" if its activation has no name."""
    kind = next(kind for kind, module in _KINDS.items() if isinstance(net, module))
    own = {field.name: field.default for field in dataclasses.fields(net)}
    names = sorted(own.keys() - {"parent", "name"})
    fields = {name: getattr(net, name) for name in names if getattr(net, name) != own[name]}
    if "activation" in fields:
        names = [name for name, known in ACTIVATIONS.items() if known is fields["activation"]]
        if not names:
            return ""
        fields["activation"] = names[0]
    named = {name: x.name if isinstance(x, np.dtype) else x for name, x in fields.items()}
    return json.dumps({"kind": kind, **named, "dtype": net.dtype.name})


_KINDS: Mapping[str, Any] = types.MappingProxyType(
    {"mlp": MLP, "conv_trunk": Trunk, "resnet": ResNet}
)
