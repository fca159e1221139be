"""A network as pure functions, what they are applied to, and two of them in a row."""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from distill_jax import shapes
from distill_jax.errors import UserError

Params = Any  # a nested dict of arrays


class Variables(NamedTuple):
    """What a model with state is applied to.

    params: what the optimizer trains. state: what training changes besides, such as the running
    statistics of BatchNorm; a tree of arrays.
    """

    params: Params
    state: Any


def join(params: Params, state: Any) -> Params | Variables:
    """What a model is applied to: params and state, or the params alone if the state is ()."""
    return params if isinstance(state, tuple) and state == () else Variables(params, state)


def split(variables: Params | Variables) -> Variables:
    """Params and state, () if there is none."""
    return variables if isinstance(variables, Variables) else Variables(variables, ())


class Model(NamedTuple):
    """A network as pure functions of its variables: its params alone, or `Variables` if it has a state.

    init: `(key, inputs [B, ...]) -> variables`; only the inputs' shape matters.
    apply: `(variables, inputs [B, ...], dropout_key=None) -> logits [B, C]` float32, in evaluation
        mode: nothing is dropped, norms take their running statistics, a state stays as it is. A model
        without `train` drops by the key.
    hidden: the same arguments -> the last hidden layer's activations `[B, D]`, which the layer
        "output" of the params (or `train_step.Fused.output`) makes the logits of, for losses fused with
        it (`fused_loss`). None where there is no such layer.
    description: JSON from which `build` makes the same model again; "" for a model of your own.
    train: `(variables, inputs, dropout_key, output="apply") -> (logits, new state)`, in training mode.
        With output="hidden" or "activations" it gives what these do; a model without them needs no
        such argument. The new state is like the old one, or () if there is none. None: a model without
        state, whose training mode is `apply` with a key.
    activations: the same arguments as `apply` -> (logits, {name: array `[B, ...]`}), for losses that
        read the student's or the teacher's (`step_losses.hint_loss`). None if there are none.
    """

    init: Callable[[Array, Array], Params | Variables]
    apply: Callable[..., Array]
    hidden: Callable[..., Array] | None = None
    description: str = ""
    train: Callable[..., tuple[Any, Any]] | None = None
    activations: Callable[..., tuple[Array, dict[str, Array]]] | None = None


def run(
    model: Model,
    variables: Params | Variables,
    inputs: Array,
    dropout_key: Array | None = None,
    output: str = "apply",
) -> tuple[Any, Any]:
    """One of a model's outputs, and its state afterwards, () if it has none.

    Args:
        model: any.
        variables: what it is applied to.
        inputs: `[B, ...]`.
        dropout_key: for training mode; None for evaluation mode.
        output: "apply" for the logits, "hidden" or "activations".

    Raises:
        UserError: for a new state that has other arrays than the old one.
    """
    if model.train is None or dropout_key is None:
        outputs = getattr(model, output)(variables, inputs, dropout_key=dropout_key)
        return outputs, split(variables).state
    which = {} if output == "apply" else {"output": output}
    outputs, after = model.train(variables, inputs, dropout_key, **which)
    before = split(variables).state
    there, now = _shapes(before), _shapes(after)
    if changed := sorted({name for name, _ in {*there.items()} ^ {*now.items()}}):
        name = changed[0]
        raise UserError(
            f"training changes the model's state{name} from {there.get(name, 'nothing')} to "
            f"{now.get(name, 'nothing')}; expected other numbers alone (what layers sow belongs "
            "in 'intermediates')"
        )
    return outputs, jax.tree.map(lambda x, old: x.astype(old.dtype), after, before)  # no weak types


def _shapes(state: Any) -> dict[str, str]:
    """Dtype and shape of each array of a state, by its path."""
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path): shapes.describe(leaf) for path, leaf in leaves}


@functools.cache
def chain(trunk: Model, head: Model) -> Model:
    """One model of a trunk that makes features and a head that classifies them.

    Their parameters lie side by side in one dict; if one has a state, it has both in {"trunk", "head"}.
    A trunk without `train` drops nothing.

    Raises:
        UserError: from `init`, for layers of the same name.
    """

    def init(key: Array, inputs: Array) -> Params | Variables:
        trunk_key, head_key = jax.random.split(key)
        variables = trunk.init(trunk_key, inputs)
        params, state = split(variables)
        own, head_state = split(head.init(head_key, trunk.apply(variables, inputs)))
        if both := sorted(set(params) & set(own)):
            raise UserError(f"trunk and head both have a layer named {both[0]!r}: rename one")
        return join({**params, **own}, _states(state, head_state))

    def apply(output: str, variables: Any, inputs: Array, dropout_key: Array | None = None) -> Any:
        of_trunk, of_head = _parts(variables)
        return getattr(head, output)(of_head, trunk.apply(of_trunk, inputs), dropout_key)

    def train(variables: Any, inputs: Array, dropout_key: Array, output: str = "apply") -> Any:
        trunk_key, head_key = jax.random.split(dropout_key)
        of_trunk, of_head = _parts(variables)
        features, state = run(trunk, of_trunk, inputs, trunk_key if trunk.train else None)
        outputs, head_state = run(head, of_head, features, head_key, output)
        return outputs, _states(state, head_state)

    parts = [json.loads(part.description or "null") for part in (trunk, head)]
    return Model(
        init,
        functools.partial(apply, "apply"),
        functools.partial(apply, "hidden") if head.hidden else None,
        json.dumps({"kind": "chain", "parts": parts}) if all(parts) else "",
        train if trunk.train or head.train else None,
    )


def _parts(variables: Params | Variables) -> list[Params | Variables]:
    """What trunk and head of a chain are applied to: each takes its own of the params."""
    params, states = split(variables)
    return [join(params, states[name] if states else ()) for name in ("trunk", "head")]


def _states(trunk: Any, head: Any) -> Any:
    return {"trunk": trunk, "head": head} if jax.tree.leaves((trunk, head)) else ()


def head_params(variables: Params | Variables) -> Params | Variables:
    """The layers of a chained model that come after its trunk, a `conv_trunk`; with their state.

    Raises:
        UserError: if the trunk is another model: its layers' names say nothing of which are the head's.
    """
    params, state = split(variables)
    head = {name: layer for name, layer in params.items() if not name.startswith("conv_")}
    if len(head) == len(params):
        raise UserError(f"no layer is named conv_0, conv_1, ..., only {', '.join(sorted(params))}")
    return join(head, state["head"] if state else ())


def parameter_count(params: Params) -> int:
    """How many numbers a tree of parameters holds; of `Variables`, without the state."""
    return sum(leaf.size for leaf in jax.tree.leaves(split(params).params))
