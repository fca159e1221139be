"""What programs a study's trainings are, from shapes: `experiments.compiled` compiles them.

Each study lists its own in programs.py. A test holds the lists against what a run trains.
"""

import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from distill_jax import ahead, models, nets
from distill_jax.ahead import Shapes
from distill_jax.data.augment import Views
from distill_jax.data.images import Examples
from distill_jax.models import Model
from distill_jax.recipe import PLAIN, Reader
from distill_jax.soft_targets.views import logits_of_views
from distill_jax.soft_targets.writer import BATCH_SIZE
from distill_jax.train_step import Loss, Transform
from experiments.common.training import make_recipe

_NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Training(NamedTuple):
    """Nets that are trained as one program.

    name: of the training's folder. net: the config's section. fields: of one member. members: M.
    numbers: the traced ones beside "learning_rate". own, own_constants: what each member has of its
    own; all else is shared. passes: as for `experiments.common.training.train`; and so are transforms,
    of which the section's own come last. evaluation: sets that errors are counted on.
    """

    name: str
    net: ConfigDict
    model: Model
    loss: Loss
    fields: Shapes
    members: int
    numbers: Sequence[str] = ()
    own: Sequence[str] = ()
    passes: int = 1
    transforms: Sequence[Transform] = ()
    constants: Mapping[str, Any] = _NOTHING
    own_constants: Sequence[str] = ()
    reader: Reader = PLAIN
    evaluation: Mapping[str, Shapes] = _NOTHING


class Pass(NamedTuple):
    """Logits of frozen nets over examples, of which soft targets are made: on one device.

    name: of what is made. kind: says what makes passes the same program. trace: that program, for a
    mesh. parameters: of all nets.
    """

    name: str
    kind: str
    trace: Callable[[Any], jax.stages.Traced]
    parameters: int


Programs = Callable[[ConfigDict], Iterator[tuple[str, Training]]]
"""A study's trainings: `config -> (stage, training)` of each."""


def shapes_of(examples: Examples) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of examples."""
    return {name: shape(field.shape, field.dtype) for name, field in examples.items()}


Passes = Callable[[ConfigDict], Iterator[tuple[str, Pass]]]
"""A study's passes: `config -> (stage, pass)` of each."""


def frozen(model: Model, inputs: Any, members: int | None = None) -> Any:
    """The shapes of a net's parameters, or of several nets' `[M, ...]`, from those of inputs."""

    def init(inputs: Any) -> Any:
        if members is None:
            return model.init(jax.random.key(0), inputs)
        return jax.vmap(model.init, (0, None))(jax.random.split(jax.random.key(0), members), inputs)

    return jax.eval_shape(init, resized({"inputs": inputs}, 1)["inputs"])


def logits_over(
    name: str, apply: Callable[..., Any], params: Any, inputs: jax.ShapeDtypeStruct
) -> Pass:
    """A pass of `soft_targets.logits_over`."""

    def trace(mesh: Any) -> jax.stages.Traced:
        return ahead.trace_logits(apply, params, inputs, mesh=mesh)

    return Pass(name, f"{apply} {params} {inputs}", trace, models.parameter_count(params))


def of_views(name: str, apply: Callable[..., Any], params: Any, inputs: Any, views: Views) -> Pass:
    """The batches of `soft_targets.write_views`."""
    size = min(BATCH_SIZE, inputs.shape[0])
    arrays = params, shape((size, *inputs.shape[1:]), inputs.dtype), shape((size,), np.int32)
    return on_one(name, logits_of_views, (apply, views), arrays)


def on_one(name: str, function: Any, static: Sequence[Any], arrays: Sequence[Any]) -> Pass:
    """A jitted function of static arguments, then parameters and other arrays."""

    def trace(mesh: Any) -> jax.stages.Traced:
        return ahead.trace_on_one(function, static, arrays, mesh=mesh)

    return Pass(name, f"{static} {arrays}", trace, models.parameter_count(arrays[0]))


def resized(fields: Shapes, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of so many examples."""
    return {
        name: jax.ShapeDtypeStruct((size, *field.shape[1:]), field.dtype)
        for name, field in fields.items()
    }


def logits(*sizes: int) -> jax.ShapeDtypeStruct:
    """Of a teacher, float32 `[N, ..., C]`."""
    return shape(sizes, np.float32)


def shape(sizes: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype, as it is on a device."""
    return jax.ShapeDtypeStruct(tuple(sizes), jax.dtypes.canonicalize_dtype(dtype))


def trace(one: Training, mesh: Any) -> jax.stages.Traced:
    """One unit of the training, for a mesh."""
    return ahead.trace_training(
        one.model,
        one.fields,
        one.loss,
        make_recipe(one.net, one.passes, one.transforms),
        members=one.members,
        mesh=mesh,
        own=one.own,
        numbers=("learning_rate", *one.numbers),
        constants=one.constants,
        own_constants=one.own_constants,
        reader=one.reader,
    )


def describe(one: Training) -> dict[str, Any]:
    """What makes trainings the same program, as `training_note` has it of a run."""
    recipe = make_recipe(one.net, one.passes, one.transforms)
    return {
        "model": nets.describe(one.model) or "of a function",
        "members": one.members,
        "batch_size": recipe.batch_size,
        "micro_batches": recipe.micro_batches,
        "report_every": recipe.report_every,
        "transforms": len(recipe.transforms),
        "numbers": sorted(["learning_rate", *one.numbers]),
        "fields": {
            name: [f"{np.dtype(x.dtype)}{list(x.shape)}", name in one.own]
            for name, x in sorted(one.fields.items())
        },
    }


def distinct(programs: Iterator[tuple[str, Training]]) -> dict[str, Training]:
    """One of each kind, by the names of all that are of the kind."""
    kinds: dict[str, tuple[list[str], Training]] = {}
    for stage, one in programs:
        kind = json.dumps(describe(one)) + f"{one.loss} {one.net.optimizer} {one.net.max_norm}"
        name = one.name if one.name == stage else f"{stage}: {one.name}"
        kinds.setdefault(kind, ([], one))[0].append(name)
    return {", ".join(names): one for names, one in kinds.values()}


def distinct_passes(passes: Iterator[tuple[str, Pass]]) -> dict[str, Pass]:
    """One of each kind, by the names of all that are of the kind."""
    kinds: dict[str, tuple[list[str], Pass]] = {}
    for stage, one in passes:
        kinds.setdefault(one.kind, ([], one))[0].append(f"{stage}: {one.name}")
    return {", ".join(names): one for names, one in kinds.values()}
