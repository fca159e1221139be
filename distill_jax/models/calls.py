"""How a Flax module is called as a `Model`: flags of its mode, inputs, named activations."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import Array

from distill_jax import shapes
from distill_jax.errors import UserError
from distill_jax.models.model import Model, Variables

Settings = tuple[tuple[str, Any], ...]
"""What puts a module into a mode, by name; hashable, so that equal models are one."""

_ON_IN_TRAINING = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}

Run = Callable[[str, Any, Any, Array | None], tuple[Any, Any]]
"""`(output, variables, inputs, key) -> (outputs, new state)`, in training mode with a key."""


def as_model(init: Callable[..., Any], run: Run, *, hidden: bool, activations: bool) -> Model:
    """A model of a module's functions. hidden, activations: whether it has these outputs."""

    def apply(output: str, variables: Any, inputs: Any, dropout_key: Array | None = None) -> Any:
        key = None if isinstance(variables, Variables) else dropout_key
        return run(output, variables, inputs, key)[0]

    def train(variables: Any, inputs: Any, dropout_key: Array, output: str = "apply") -> Any:
        return run(output, variables, inputs, dropout_key)

    return Model(
        init,
        functools.partial(apply, "apply"),
        functools.partial(apply, "hidden") if hidden else None,
        train=train,
        activations=functools.partial(apply, "activations") if activations else None,
    )


def same(make: Any, *given: Any) -> Model:
    """What a cached function makes: the same model for equal arguments, so that it is compiled once."""
    try:
        hash(given)
    except TypeError:  # a module with a list as a field, say
        return make.__wrapped__(*given)
    return make(*given)


def fixed(settings: Mapping[str, Any] | None) -> Settings | None:
    """Settings that a user gives; None if they are to be found."""
    return None if settings is None else tuple(sorted(settings.items()))


def of_mode(call: Callable[..., Any], train: bool, fields: Sequence[str] = ()) -> dict[str, bool]:
    """The flags by their usual names that a call takes, or else that a module has as fields.

    Examples:
        >>> of_mode(lambda x, train: x, True), of_mode(lambda x: x, False, ["deterministic"])
        ({'train': True}, {'deterministic': True})
    """
    taken = inspect.signature(call).parameters
    names = [name for name in _ON_IN_TRAINING if name in taken]
    names = names or [name for name in _ON_IN_TRAINING if name in fields]
    return {name: train == _ON_IN_TRAINING[name] for name in names}


def cut(call: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """Settings that are arguments of a call, and those that are not."""
    taken = inspect.signature(call).parameters.values()
    names = {one.name for one in taken}
    if any(one.kind == one.VAR_KEYWORD for one in taken):
        names |= settings.keys()
    rest = {name: x for name, x in settings.items() if name not in names}
    return {name: x for name, x in settings.items() if name in names}, rest


def arguments(inputs: Any, spread: bool) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The inputs as arguments of a call: one, or with `spread` each part of a dict or tuple."""
    if not spread:
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, tuple | list):
        return inputs, {}
    raise UserError(
        f"inputs of type {type(inputs).__name__} can't be spread; expected a dict or a tuple of them"
    )


def check_logits(logits: Any, name: str) -> Array:
    """A module's output, checked to be logits `[B, ..., C]`."""
    shapes.check(**{f"the output of {name}": (logits, "float ... C")})
    return logits


def named(found: Mapping[Any, Any], names: Sequence[str]) -> dict[str, Array]:
    """Of what a module's layers gave or sowed, the arrays of some names, such as "block_0/conv".

    Raises:
        UserError: for a name that isn't there.

    Examples:
        >>> named({"block": {"__call__": (1,), "mean": (2, 3)}}, ["block", "block/mean"])
        {'block': 1, 'block/mean': 3}
    """
    flat: dict[str, Any] = {}

    def walk(way: tuple[str, ...], tree: Any) -> None:
        for name, part in tree.items():
            if isinstance(part, Mapping):
                walk((*way, str(name)), part)
            elif way or name != "__call__":
                flat["/".join(way if name == "__call__" else (*way, str(name)))] = part[-1]

    walk((), found)
    if missing := [name for name in names if name not in flat]:
        raise UserError(f"no activations are named {missing[0]!r}, only {', '.join(sorted(flat))}")
    return {name: flat[name] for name in names}
