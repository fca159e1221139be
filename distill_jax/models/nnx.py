"""Any Flax NNX module as a model."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from distill_jax import batches
from distill_jax.errors import UserError
from distill_jax.models import calls
from distill_jax.models.model import Model, Params, Variables, join, split

_PARTS = (nnx.Param, nnx.RngState, nnx.Intermediate, ...)


def from_nnx(
    make_module: Callable[[nnx.Rngs], nnx.Module],
    *,
    hidden: str | None = None,
    activations: Sequence[str] = (),
    spread: bool = False,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> Model:
    """A model of a Flax NNX module; the same one for the same function and equal arguments.

    Its params are all `nnx.Param`, as nested dicts of arrays; its state are all other variables, such as
    BatchNorm's statistics, but not those of random numbers: these come from the step's dropout key.

    Args:
        make_module: makes the module, whose variables have shapes of their own.
        hidden, activations, spread: as for `from_linen`; values are sown as `nnx.Intermediate`.
        training: keyword arguments of the call, or attributes of the module and those within it, besides
            those that `nnx.Module.train` sets. By default the call's flags are found in its signature.
        evaluation: the same, besides `nnx.Module.eval`.

    Raises:
        UserError: as for `from_linen`; for attributes that no module has.

    Examples:
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.norm = nnx.BatchNorm(2, rngs=rngs)
        ...         self.output = nnx.Linear(2, 3, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.output(self.norm(x))
        >>> model = from_nnx(lambda rngs: Net(rngs=rngs))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> sorted(variables.params["output"]), sorted(variables.state["norm"])
        (['bias', 'kernel'], ['mean', 'var'])
        >>> model.apply(variables, jnp.ones((4, 2))).shape
        (4, 3)
    """
    modes = calls.fixed(training), calls.fixed(evaluation)
    return calls.same(_as_model, make_module, hidden, tuple(activations), spread, modes)


@functools.cache
def _as_model(
    make_module: Callable[[nnx.Rngs], nnx.Module],
    hidden: str | None,
    activations: tuple[str, ...],
    spread: bool,
    modes: tuple[calls.Settings | None, calls.Settings | None],
) -> Model:
    @functools.cache
    def empty() -> Any:
        """The module's structure, and its variables without their numbers."""
        return nnx.split(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))), *_PARTS)

    def init(key: Array, inputs: Any) -> Params | Variables:
        batches.count_rows(inputs)
        parts: Any = nnx.split(make_module(nnx.Rngs(key)), *_PARTS)
        _, params, _, _, state = parts
        return join(_nested(params), _nested(state) or ())

    def run(output: str, variables: Any, inputs: Any, key: Array | None) -> tuple[Any, Any]:
        batches.count_rows(inputs)
        params, state = split(variables)
        structure, own_params, random, sown, own_state = empty()
        keys = _drawn(random, jax.random.key(0) if key is None else key)
        before = _filled(own_state, state or {})
        given = _arrays(keys, before)
        module = nnx.merge(structure, _filled(own_params, params), keys, sown, before)
        name = type(module).__qualname__
        call = getattr(module, hidden if output == "hidden" and hidden else "__call__")
        flags = _set_mode(module, call, key is not None, modes[0 if key is not None else 1])
        args, kwargs = calls.arguments(inputs, spread)

        def forward(module: nnx.Module) -> Any:
            return call(*args, **kwargs, **flags)

        how: dict[str, Any] = (
            {"method_outputs": nnx.Intermediate} if output == "activations" else {}
        )
        outputs, found = nnx.capture(forward, nnx.Intermediate, **how)(module)  # `sow` needs it
        if output != "hidden":
            calls.check_logits(outputs, name)
        if output == "activations":
            outputs = outputs, calls.named(nnx.to_pure_dict(found), activations)
        parts: Any = nnx.split(module, *_PARTS)
        _, _, drawn, _, changed = parts
        after = _arrays(drawn, changed)
        if key is None and not all(map(operator.is_, given, after)):
            raise UserError(
                f"{name} draws random numbers or changes its state in evaluation mode: say what puts it "
                "into that mode by from_nnx(..., evaluation={...})"
            )
        return outputs, _nested(changed) if state else ()

    return calls.as_model(init, run, hidden=hidden is not None, activations=bool(activations))


def _set_mode(
    module: nnx.Module, call: Callable[..., Any], train: bool, settings: calls.Settings | None
) -> dict[str, Any]:
    """Puts a module into a mode; gives the arguments for that of one of its methods."""
    (module.train if train else module.eval)()
    if settings is None:
        return calls.of_mode(call, train)
    flags, attributes = calls.cut(call, dict(settings))
    if attributes:
        try:
            module.set_attributes(**attributes)
        except ValueError as error:
            raise UserError(
                f"{type(module).__qualname__} has no such attribute: {error}"
            ) from error
    return flags


def _nested(state: nnx.State) -> dict[str, Any]:
    """The arrays of variables in nested dicts, whose keys are text: "0", "1", ... in lists."""
    found: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        *outer, name = map(str, path)
        place = found
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = variable.get_value()
    return found


def _filled(like: nnx.State, arrays: Any) -> nnx.State:
    """Variables like these, with the arrays of nested dicts."""

    def value(path: tuple[Any, ...], variable: Any) -> Any:
        try:
            array = functools.reduce(lambda part, name: part[str(name)], path, arrays)
        except KeyError as error:
            way = "/".join(map(str, path))
            raise UserError(f"there is no {way} among the model's parameters and state") from error
        return variable.replace(jnp.asarray(array))

    return nnx.from_flat_state([(path, value(path, x)) for path, x in nnx.to_flat_state(like)])


def _arrays(*states: nnx.State) -> list[Any]:
    return [x.get_value() for state in states for _, x in nnx.to_flat_state(state)]


def _drawn(random: nnx.State, key: Array) -> nnx.State:
    """The variables of random numbers: keys of their own, made of one, and counts of 0."""

    def value(i: int, variable: Any) -> Any:
        own = variable.get_value()
        if not jnp.issubdtype(own.dtype, jax.dtypes.prng_key):
            return variable.replace(jnp.zeros(own.shape, own.dtype))
        made = jax.random.fold_in(key, i)
        return variable.replace(jax.random.split(made, own.shape) if own.shape else made)

    flat = nnx.to_flat_state(random)
    return nnx.from_flat_state([(path, value(i, x)) for i, (path, x) in enumerate(flat)])
