"""What programs a study's trainings are, from shapes: `experiments.compiled` compiles them.

Each study lists its own in programs.py. A test holds the lists against what a run trains.
"""

import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from distill_jax import ahead, nets
from distill_jax.ahead import Shapes
from distill_jax.data.augment import Views
from distill_jax.data.images import Examples
from distill_jax.models import Model, parameter_count
from distill_jax.recipe import PLAIN, Reader
from distill_jax.soft_targets import ensemble, writer
from distill_jax.soft_targets.views import logits_of_views
from distill_jax.train_step import Loss, Transform
from experiments.common.training import make_recipe

_One = TypeVar("_One", "Training", "Pass")
_NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Training(NamedTuple):
    """Nets that are trained as one program.

    name: of the training's folder. net: the config's section. fields: of one member. members: M.
    numbers: the traced ones beside "learning_rate". own, own_constants: what each member has of its
    own; all else is shared. passes: as for `experiments.common.training.train`; and so are transforms,
    of which the section's own come last. evaluation: sets that errors are counted on. blocks: how the
    set is streamed, if it is; the fields are then those of a block.
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
    blocks: ahead.Blocks | None = None


class Pass(NamedTuple):
    """What soft targets are made by, such as logits of frozen nets over examples: on one device.

    name: of what is made. function: jitted, of the static arguments, then arrays, of which these are
    the shapes. parameters: how many numbers nets have among them.
    """

    name: str
    function: Any
    static: tuple[Any, ...]
    arrays: tuple[Any, ...]
    parameters: int


Programs = Callable[[ConfigDict], Iterator[tuple[str, Training]]]
"""A study's trainings: `config -> (stage, training)` of each."""

Passes = Callable[[ConfigDict], Iterator[tuple[str, Pass]]]
"""A study's passes: `config -> (stage, pass)` of each."""


def shapes_of(examples: Examples) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of examples."""
    return {name: shape(field.shape, field.dtype) for name, field in examples.items()}


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
    """The pass of `soft_targets.logits_over` over inputs `[N, ...]`."""
    rows, *rest = inputs.shape
    size = min(ensemble.BATCH_SIZE, rows)
    batches = shape((-(-rows // size), size, *rest), inputs.dtype)
    arrays = params, batches
    return Pass(name, ensemble.map_batches, (apply,), arrays, parameter_count(params))


def of_views(name: str, apply: Callable[..., Any], params: Any, inputs: Any, views: Views) -> Pass:
    """The batches of `soft_targets.write_views`."""
    size = min(writer.BATCH_SIZE, inputs.shape[0])
    arrays = params, resized({"inputs": inputs}, size)["inputs"], shape((size,), np.int32)
    return Pass(name, logits_of_views, (apply, views), arrays, parameter_count(params))


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
        blocks=one.blocks,
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
        **({"steps": one.blocks.steps} if one.blocks else {}),
        "numbers": sorted(["learning_rate", *one.numbers]),
        "fields": {
            name: [f"{np.dtype(x.dtype)}{list(x.shape)}", name in one.own]
            for name, x in sorted(one.fields.items())
        },
    }


def distinct(trainings: Iterator[tuple[str, Training]]) -> dict[str, Training]:
    """One of each kind, by the names of all that are of the kind."""

    def kind(one: Training) -> str:
        net = [one.net.get(name) for name in ("optimizer", "max_norm", "jitter")]
        return f"{json.dumps(describe(one))} {one.loss} {one.transforms} {net}"

    return _by_names((kind(one), stage, one) for stage, one in trainings)


def distinct_passes(passes: Iterator[tuple[str, Pass]]) -> dict[str, Pass]:
    """One of each kind, by the names of all that are of the kind."""
    return _by_names((str(one[1:]), stage, one) for stage, one in passes)


def _by_names(found: Iterator[tuple[str, str, _One]]) -> dict[str, _One]:
    """The first of each kind, of `(kind, stage, one)`."""
    kinds: dict[str, tuple[list[str], _One]] = {}
    for kind, stage, one in found:
        name = one.name if one.name == stage else f"{stage}: {one.name}"
        kinds.setdefault(kind, ([], one))[0].append(name)
    return {", ".join(names): one for names, one in kinds.values()}
