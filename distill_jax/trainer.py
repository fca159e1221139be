"""Trains nets of one model: all members as one program, resumed from checkpoints, saved when finished.

Members differ in their keys, and by need in their examples and in traced numbers (temperature, learning
rate). The folder of a finished training is read by `distill_jax.load_net`. `train` reads it too, and
trains nothing again.
"""

import functools
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import (
    checkpoints,
    epochs,
    evaluator,
    files,
    logs,
    loop,
    nets,
    processes,
    program,
    ramps,
    ranges,
    sharding,
    train_checks,
    train_step,
    training_note,
    units,
)
from distill_jax.data.stream import Block
from distill_jax.errors import UserError
from distill_jax.models import Model, Params, Variables
from distill_jax.nets import Net
from distill_jax.recipe import FREE
from distill_jax.recipe import MULTI_LABEL as MULTI_LABEL
from distill_jax.recipe import PLAIN as PLAIN
from distill_jax.recipe import Examples as Examples
from distill_jax.recipe import Reader as Reader
from distill_jax.recipe import Recipe as Recipe
from distill_jax.recipe import Stream as Stream
from distill_jax.train_step import Batch, Loss

_SAMPLE_BYTES = 4_000_000

BEST = "validation_errors"
"""The metric that the checkpoint chosen by validation has the least of, as a mean over members."""


def train(
    directory: str | os.PathLike[str],
    model: Model,
    examples: Examples | Sequence[Examples] | Stream,
    loss: Loss,
    recipe: Recipe,
    *,
    keys: Array,
    hyper: Mapping[str, ArrayLike | Mapping[str, ArrayLike] | ramps.Schedule],
    constants: Sequence[Mapping[str, Any]] = (),
    evaluation: Mapping[str, Examples | Sequence[Examples]] = types.MappingProxyType({}),
    reader: Reader = PLAIN,
    start: Params | Variables | None = None,
    mesh: Any = None,
    selection: str = "last",
    name: str = "net",
    config: Mapping[str, Any] = types.MappingProxyType({}),
) -> Net:
    """Trains one net for each key as one vmapped program, resumed from its checkpoints.

    The same call with more epochs continues from the last checkpoint, also of a finished training. The
    optimizer is then the one of all epochs, but the first ones are done: where its schedule depends on
    their number, the nets are not those of a training that was as long from the start.

    Args:
        directory: this training's own; gets a note of what the training is (`training_note`),
            checkpoints, TensorBoard files and at the end the nets (`nets.save`). Nets that are finished
            there are read, and nothing is trained.
        model: of all members.
        examples: for all members, or each member's own (fields that are the same object or have the same
            values are kept once); or a stream, whose blocks come in one order for all. A "label" is a
            class of the model, or below 0 where unknown; a loss of soft targets needs none. "inputs"
            and "weight" are as in `train_step.Batch`.
        loss: of `distill_jax.step_losses`.
        recipe: how.
        keys: `[M]`, of initial weights, the order of examples and dropout. Equal keys, equal nets.
        hyper: traced numbers, "learning_rate" among them, each a scalar or `[M]`. A number that changes
            while training is a ramp {"from", "to", "steps"} of such (`ramps.at_step`), or a
            function of the step, the same for all members.
        constants: each member's, for the loss and the transforms; shared ones are kept once.
        evaluation: sets to count errors on after every report, by the metric's name; for all members or
            each member's own.
        reader: how the examples are read.
        start: parameters to start from, or `models.Variables` of a model with state, each leaf
            `[M, ...]`; fresh ones if not given.
        mesh: from `sharding.make_mesh`; by default all devices on its axis "data".
        selection: "last", the nets after the last epoch; or "validation", those at the checkpoint with
            the fewest `BEST` errors.
        name: shown in progress.
        config: JSON-able; kept with the nets, and part of their fingerprint.

    Returns:
        The nets, parameters as arrays of NumPy.

    Raises:
        UserError: for numbers that are not allowed or sizes that don't fit each other, a label beyond
            the model's classes, an evaluation set without known labels, a loss that is not finite, a
            folder with another training, naming what differs; see `loop.fit` and `checkpoints`. Streams'
            examples, and the code of functions, are not compared.
        Stopped: if the run was asked to stop, after saving.
    """
    train_checks.check_numbers(hyper, len(keys))
    schedules = {name: value for name, value in hyper.items() if callable(value)}
    numbers = _numbers({name: x for name, x in hyper.items() if name not in schedules}, len(keys))
    ranges.check_value("selection", selection, ranges.one_of("last", "validation"))
    directory = files.local_path(directory)
    sets = examples if isinstance(examples, Stream) else _each(examples, len(keys))
    note = training_note.describe(
        {
            "members": len(keys),
            "model": nets.describe(model) or model,
            "recipe": {name: x for name, x in vars(recipe).items() if name not in FREE},
            "keys": jax.random.key_data(keys),
            "hyper": {**numbers, **schedules},
            "loss": loss,
            "examples": _described(sets),
            "constants": training_note.of_members(constants),
            "evaluation": {
                name: _described([x] if isinstance(x, Mapping) else x)
                for name, x in evaluation.items()
            },
            "reader": reader,
            "start": start,
            "selection": selection,
            "config": nets.plain(config),
        }
    )
    training_note.check(directory, note, recipe.epochs, name)
    if _is_finished(directory, recipe.epochs):
        return _finished(directory, model, len(keys), config)
    files.check_writable(directory, "directory")
    mesh = sharding.make_mesh() if mesh is None else mesh
    plan = program.cut(recipe, sets, reader, name)
    sample = program.sample_input(sets, reader.gather)
    classes = program.num_classes(model, sample)
    sets = _checked(sets, classes, name)
    train_checks.check_evaluation(evaluation, classes, name)
    made = program.make(
        model, loss, recipe, steps=plan.steps, classes=classes, mesh=mesh, schedules=schedules
    )
    init_keys, train_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    states = _start(model, made.optimizer, mesh, init_keys if start is None else start, sample)
    nets.check_storable(states.variables)
    shared = (train_keys, numbers, units.stack(constants))
    scanned = not program.is_slow_in_loops(model, sample)
    advance_of = functools.partial(
        units.advance_of, mesh=mesh, examples=sets, scanned=scanned, shared=shared
    )
    best = BEST if BEST in evaluation else None
    if selection == "validation" and best is None:
        raise UserError("selection is 'validation', but no validation set is held out")
    training_note.write(directory, note, recipe.epochs)
    with checkpoints.open_dir(directory / "checkpoints", best) as manager:
        states, history = loop.fit(
            advance_of(recipe, made.step, reader=reader),
            states,
            plan.units,
            evaluate=_evaluator(
                evaluation,
                evaluator.compile_errors(model, reader, recipe.rows_at_once, mesh, vmapped=scanned),
                mesh,
            ),
            manager=manager,
            save_every=recipe.save_every,
            best_metric=best,
            on_record=_recorders(name, plan.units, directory, config),
        )
        seconds = history[-1]["seconds"]
        if not model.description and not isinstance(states.variables, Variables):
            loss_step = train_step.make_loss_step(
                model, made.objective, transforms=recipe.transforms, schedules=schedules
            )
            one_batch = reader._replace(size=lambda examples: recipe.batch_size)
            measure = advance_of(recipe, loss_step, reader=one_batch)
            states, sums = processes.serialize_on_cpu(measure(states, 0))
            train_checks.compare_losses(history[-1], processes.fetch(sums), name)
        if selection == "validation":
            chosen = checkpoints.restore_best(manager, states, BEST)
            assert chosen is not None
            _, states, history = chosen
    about = {
        "config": dict(config),
        "epochs": recipe.epochs,
        "selection": selection,
        "inputs": nets.describe_inputs(sample),
        "num_classes": classes,
    }
    records = [{"epoch": record["unit"] * plan.epochs, **record} for record in history]
    params = jax.tree.map(np.asarray, processes.fetch(states.variables))
    net = Net(model, params, records, seconds, len(keys), about)
    nets.save(directory, net, inputs=_some_inputs(sets, reader, sample), overwrite=True)
    processes.wait()
    return net


def _some_inputs(examples: Sequence[Examples] | Stream, reader: Reader, sample: Any) -> Any:
    """Up to 256 inputs of the first member, to try the nets on; None of a stream, or of tuples."""
    if isinstance(examples, Stream) or not isinstance(sample, Mapping | Array):
        return None
    size = epochs.count_examples(examples[0])
    most = _SAMPLE_BYTES // max(1, sum(leaf.nbytes for leaf in jax.tree.leaves(sample)))
    rows = np.linspace(0, size - 1, max(1, min(size, most, 256)), dtype=np.int32)
    with jax.default_device(_host_device()):  # the other device may be full
        found = reader.gather(dict(examples[0]), jnp.asarray(rows))["inputs"]
    return jax.tree.map(np.asarray, found)


def _host_device() -> Any:
    """A CPU, where JAX has one beside its other devices."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _described(sets: Sequence[Examples] | Stream) -> dict[str, Any]:
    """What the note says of examples."""
    if isinstance(sets, Stream):
        return {"steps": sets.steps, "blocks": sets.blocks, "inputs": str(sets.inputs)}
    return training_note.of_members(sets)


def _is_finished(directory: Path, epochs: int) -> bool:
    return nets.exists(directory) and nets.read_meta(directory).get("epochs", epochs) == epochs


def _finished(directory: Path, model: Model, count: int, config: Mapping[str, Any]) -> Net:
    """The nets of a finished training, checked to be those that are asked for."""
    meta = nets.read_meta(directory)
    there = {"members": meta["members"], "model": meta["model"], **meta["config"]}
    now = {"members": count, "model": nets.describe(model), **nets.plain(config)}
    files.check_same(f"{directory} holds the nets of another training", there, now)
    return nets.load(directory, model)


def _each(examples: Examples | Sequence[Examples], count: int) -> Sequence[Examples]:
    """The examples of each member."""
    sets = [examples] * count if isinstance(examples, Mapping) else examples
    if len(sets) != count:
        raise UserError(f"there are {len(sets)} sets of examples for {count} keys of members")
    return sets


def _start(model: Model, optimizer: Any, mesh: Any, starts: Any, sample: Any) -> Any:
    """The members' states at step 0, of keys `[M]` or of variables with a leading axis."""
    if isinstance(starts, Array):
        return sharding.init_members(
            lambda key: train_step.init_state(model, optimizer, key, sample), starts, mesh
        )
    return sharding.init_members(
        lambda variables: train_step.state_of(variables, optimizer), starts, mesh
    )


def _numbers(hyper: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Traced numbers float32 `[M]`, and ramps of three."""
    return {
        name: _numbers(value, count)
        if isinstance(value, Mapping)
        else jnp.broadcast_to(jnp.asarray(value, jnp.float32), (count,))
        for name, value in hyper.items()
    }


def _checked(
    examples: Sequence[Examples] | Stream, classes: int, name: str
) -> Sequence[Examples] | Stream:
    """The examples, whose labels are checked: now, or block by block."""
    if not isinstance(examples, Stream):
        train_checks.check_labels(examples, classes, name)
        train_checks.check_weights(examples, name)
        return examples

    def put(block: Block, mesh: Any) -> Batch:
        train_checks.check_labels([block], classes, name)
        train_checks.check_weights([block], name, all_zero=True)
        return examples.put(block, mesh)

    return examples._replace(put=put)


def _recorders(
    name: str, units: int, directory: Path, config: Mapping[str, Any]
) -> list[Callable[[loop.Record], None]]:
    if not processes.is_main():
        return []
    kept = [logs.print_progress(name, units), logs.jsonl(directory), logs.tensorboard(directory)]
    return kept + logs.services(directory, units, config)


def _evaluator(
    evaluation: Mapping[str, Examples | Sequence[Examples]],
    count: Any,
    mesh: Any,
) -> Callable[[train_step.TrainState], dict[str, Array]]:
    def put(examples: Examples | Sequence[Examples]) -> tuple[Batch, Batch]:
        """On the devices: the fields that each member has of its own `[M, ...]`, and those of all."""
        fields, per_member = units.stack([examples] if isinstance(examples, Mapping) else examples)
        arrays = sharding.put_examples(fields, mesh, per_member)
        own = {name: array for name, array in arrays.items() if per_member[name]}
        return own, {name: array for name, array in arrays.items() if not per_member[name]}

    sets = {name: put(examples) for name, examples in evaluation.items()}

    def evaluate(states: train_step.TrainState) -> dict[str, Array]:
        return {
            name: processes.serialize_on_cpu(count(states.variables, *parts))
            for name, parts in sets.items()
        }

    return evaluate
