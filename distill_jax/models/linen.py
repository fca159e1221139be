"""Any Flax Linen module as a model."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import errors
from flax import linen as nn
from jax import Array

from distill_jax import batches, shapes
from distill_jax.errors import UserError
from distill_jax.models import calls
from distill_jax.models.model import Model, Params, Variables, join, split


def from_linen(
    module: nn.Module,
    *,
    hidden: str | None = None,
    activations: Sequence[str] = (),
    spread: bool = False,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> Model:
    """A model of a Flax Linen module; the same one for equal arguments.

    All collections but "params" and "intermediates" are its state, such as BatchNorm's "batch_stats".
    Its random numbers, of dropout and any other stream, come from the step's dropout key.

    Args:
        module: called with the inputs, gives logits of floating point `[B, ..., C]`.
        hidden: a method that gives what the layer "output" is applied to, for `Model.hidden`.
        activations: for `Model.activations`, names of submodules, whose outputs are meant, or of values
            that they sow in "intermediates", such as "block_0/conv"; of several calls the last.
        spread: inputs are a dict or a tuple, whose parts are arguments of their own.
        training: keyword arguments of the call, or fields of the module, that put it into training mode.
            By default the usual flags are found in the call's signature, else in the fields: train,
            training, is_training, deterministic, use_running_average.
        evaluation: the same for evaluation mode, which parameters are initialised in too.

    Raises:
        UserError: when called, for inputs that don't fit the parameters, outputs that aren't logits,
            activations that aren't there, and for a module that draws random numbers or changes its
            state in evaluation mode.

    Examples:
        >>> import jax.numpy as jnp
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.BatchNorm(use_running_average=not train)(x)
        ...         return nn.Dense(3, name="output")(x)
        >>> model = from_linen(Net())
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> sorted(variables.params), sorted(variables.state)
        (['BatchNorm_0', 'output'], ['batch_stats'])
        >>> model.apply(variables, jnp.ones((4, 2))).shape
        (4, 3)
    """
    modes = calls.fixed(training), calls.fixed(evaluation)
    return calls.same(_as_model, module, hidden, tuple(activations), spread, modes)


@functools.cache
def _as_model(
    module: nn.Module,
    hidden: str | None,
    activations: tuple[str, ...],
    spread: bool,
    modes: tuple[calls.Settings | None, calls.Settings | None],
) -> Model:
    name = type(module).__qualname__
    fields = [field.name for field in dataclasses.fields(module) if field.init]

    def bind(method: str, train: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The module in a mode, and the arguments for that of one of its methods."""
        call, settings = getattr(module, method), modes[0 if train else 1]
        found = calls.of_mode(call, train, fields) if settings is None else dict(settings)
        flags, own = calls.cut(call, found)
        if unknown := sorted(set(own) - set(fields)):
            raise UserError(f"{name} has no field, and {method} no argument, named {unknown[0]!r}")
        return (module.clone(**own) if own else module), flags

    def init(key: Array, inputs: Any) -> Params | Variables:
        batches.count_rows(inputs)
        net, flags = bind("__call__", train=False)
        args, kwargs = calls.arguments(inputs, spread)
        made = dict(nn.meta.unbox(net.init(key, *args, **kwargs, **flags)))
        return join(made.pop("params", {}), made or ())

    def run(output: str, variables: Any, inputs: Any, key: Array | None) -> tuple[Any, Any]:
        batches.count_rows(inputs)
        params, state = split(variables)
        method = hidden if output == "hidden" and hidden else "__call__"
        net, flags = bind(method, train=key is not None)
        args, kwargs = calls.arguments(inputs, spread)
        captured = ["intermediates"] if output == "activations" else []
        # What asks for another stream than dropout takes that of "params", which is there for all.
        rngs = {} if key is None else {"dropout": key, "params": jax.random.fold_in(key, 1)}
        try:
            outputs, changed = net.apply(
                {"params": params, **dict(state)},
                *args,
                **kwargs,
                **flags,
                rngs=rngs,
                method=method,
                mutable=[*captured, *(state if key is not None else ())],
                capture_intermediates=bool(captured),
            )
        except errors.ScopeParamShapeError as error:
            there = jax.tree.map(shapes.describe, inputs)
            raise UserError(
                f"inputs are {there}, which these parameters are not for: {error}"
            ) from error
        except (errors.InvalidRngError, errors.ModifyScopeVariableError) as error:
            raise UserError(
                f"{name} draws random numbers or changes its state in evaluation mode: say what puts it "
                f"into that mode by from_linen(..., evaluation={{...}}): {error}"
            ) from error
        changed = dict(changed)
        found = changed.pop("intermediates", {})
        if output != "hidden":
            calls.check_logits(outputs, name)
        if captured:
            outputs = outputs, calls.named(found, activations)
        return outputs, changed if state else ()

    return calls.as_model(init, run, hidden=hidden is not None, activations=bool(activations))
