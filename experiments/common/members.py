"""Trains the nets of a study: all seeds, times all variants, as the members of one program."""

import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from distill_jax import checkpoints, loop, models, optimizers, processes, sharding, train_step
from distill_jax.data import stream
from distill_jax.data.augment import jitter
from distill_jax.data.images import Examples
from distill_jax.epochs import (
    Draw,
    Epoch,
    Gather,
    count_labels,
    make_epoch,
    shuffle,
    steps_per_epoch,
    take_rows,
)
from distill_jax.errors import UserError
from distill_jax.soft_targets import logits_over
from experiments.common.study import write_json

BEST = "validation_errors"  # the metric that the best checkpoint has the least of

Evaluation = Mapping[str, Examples | Sequence[Examples]]
"""Sets to count errors on after every report, by the metric's name: {"test_errors": examples}; one for
all members, or each member's own."""


class Cases(NamedTuple):
    """How a study's examples are read on the device.

    gather: makes a batch of them. count_errors: `(model, params, examples) -> int32 []`. draw and size:
    as for `make_epoch`.
    """

    gather: Gather
    count_errors: Callable[[models.Model, models.Params, train_step.Batch], Array]
    draw: Draw = shuffle
    size: Callable[[Any], int] = count_labels


PLAIN = Cases(
    take_rows,
    lambda model, params, examples: train_step.make_eval_step(model)(params, examples)["errors"],
)
"""Examples that are a batch already: fields `[N, ...]`."""


class Stream(NamedTuple):
    """Training examples that come in blocks (`distill_jax.data.stream`).

    open_blocks: the blocks from a given one on. steps: batches in each. blocks: in an epoch.
    inputs: one input's shape and dtype. put: `(block, mesh) ->` the block on the devices. per_member:
    whether a field lies there with a leading member axis, as for `sharding.compile_epoch`.
    make_run: `(step, shard_batch) ->` what trains on a block.
    """

    open_blocks: Callable[[int], Iterator[stream.Block]]
    steps: int
    blocks: int
    inputs: jax.ShapeDtypeStruct
    put: Callable[[stream.Block, Any], train_step.Batch]
    per_member: Mapping[str, bool]
    make_run: Callable[
        [train_step.TrainStep, Callable[[train_step.Batch], train_step.Batch]], Epoch
    ]


class Trained(NamedTuple):
    """M trained nets. params: every leaf `[M, ...]`. seconds: of training, over all resumptions."""

    model: models.Model
    params: models.Params
    history: list[loop.Record]
    seconds: float

    def logits(self, member: int, images: np.ndarray) -> np.ndarray:
        """One member's logits `[N, C]` over images `[N, ...]`, in evaluation mode."""
        params = jax.tree.map(lambda leaf: leaf[member], self.params)
        return logits_over(self.model.apply, params, images)


def train(
    net: ConfigDict,
    config: ConfigDict,
    directory: Path,
    name: str,
    model: models.Model,
    examples: Sequence[Examples] | Stream,
    loss: train_step.Loss,
    variants: Sequence[Mapping[str, float]] = ({},),
    evaluation: Evaluation = types.MappingProxyType({}),
    passes: int = 1,
    cases: Cases = PLAIN,
    start: models.Params | None = None,
) -> Trained:
    """Trains one net per variant and seed as one vmapped program, resumed from its checkpoints.

    Args:
        net: the config's section with sizes and recipe.
        config: the whole config: its seeds and mesh.
        directory: for checkpoints and TensorBoard files of this run.
        name: shown in progress, and part of the randomness: other names, other initial weights.
        model: from `build_model`.
        examples: each seed's own, and fields that are the same for all seeds are kept once; or a
            stream, whose blocks come in one order for all.
        loss: of `distill_jax.train_step`.
        variants: further traced numbers per net ("temperature", "hard_weight", "learning_rate").
            Member `v * len(seeds) + s` is variant v of seed s.
        evaluation: sets to count errors on.
        passes: epochs over small examples for each of the net's epochs.
        cases: how the examples are read.
        start: parameters to start from, each leaf `[M, ...]`; fresh ones if not given.

    Returns:
        The nets after the last epoch; or, if the config's selection is "validation", at the checkpoint
        with the fewest validation errors, as the mean over members.
    """
    mesh = sharding.make_mesh(**config.mesh)
    steps, units, unit_epochs = _cut_training(net, name, examples, passes, cases)
    optimizer = build_optimizer(net, steps, net.epochs * passes)
    sample = _sample_input(examples, cases.gather)
    step = train_step.make_train_step(
        model,
        optimizer,
        _fuse(net, model, loss, sample, mesh),
        transforms=[jitter(net.jitter)] if net.jitter else [],
        micro_batches=net.micro_batches,
    )
    init_keys, train_keys = _member_keys(config.seeds, name, len(variants))
    if start is None:
        states = sharding.init_members(
            lambda key: train_step.init_state(model, optimizer, key, sample), init_keys, mesh
        )
    else:
        states = sharding.init_members(
            lambda params: train_step.state_of(params, optimizer), start, mesh
        )
    hyper = _hyper(net, variants, len(config.seeds))
    advance = _advance(
        net,
        step,
        mesh,
        examples,
        len(variants),
        net.report_every * passes,
        cases,
        train_keys,
        hyper,
    )
    best = BEST if BEST in evaluation else None
    if config.selection == "validation" and best is None:
        raise UserError("selection is 'validation', but data.validation holds no examples out")
    with checkpoints.open_dir(directory / "checkpoints", best) as manager:
        states, history = loop.fit(
            advance,
            states,
            units,
            _evaluator(model, evaluation, cases, mesh),
            manager,
            net.save_every,
            best,
            on_record=_recorders(name, units, directory),
        )
        _write_curve(directory / "curve.json", history, unit_epochs)
        seconds = history[-1]["seconds"]
        if config.selection == "validation":
            chosen = checkpoints.restore_best(manager, states, BEST)
            assert chosen is not None
            _, states, history = chosen
    return Trained(model, _on_this_process(states.params), history, seconds)


def _fuse(
    net: ConfigDict, model: models.Model, loss: train_step.Loss, sample: Array, mesh: Any
) -> train_step.Loss | train_step.Fused:
    """The loss fused with the output layer, if a batch has as many logits as the config says."""
    logits = jax.eval_shape(lambda x: model.apply(model.init(jax.random.key(0), x), x), sample)
    size = net.batch_size // net.micro_batches * logits.shape[-1]
    if model.hidden is None or not 0 < net.fused_logits <= size:
        return loss
    return train_step.Fused(loss, over=sharding.over_data(mesh))


def _on_this_process(params: models.Params) -> models.Params:
    """Parameters that this process can use by itself."""
    if processes.count() == 1:
        return params
    return jax.tree.map(jnp.asarray, processes.fetch(params))


def _recorders(name: str, units: int, directory: Path) -> list[Callable[[loop.Record], None]]:
    if not processes.is_main():
        return []
    return [loop.print_progress(name, units), loop.tensorboard(directory)]


def _cut_training(
    net: ConfigDict,
    name: str,
    examples: Sequence[Examples] | Stream,
    passes: int,
    cases: Cases,
) -> tuple[int, int, float]:
    """Steps in an epoch, units (dispatches) in all, and epochs in a unit."""
    if isinstance(examples, Stream):  # a unit is a block
        return examples.steps * examples.blocks, net.epochs * examples.blocks, 1 / examples.blocks
    if net.epochs % net.report_every:
        raise UserError(
            f"{name}: epochs {net.epochs} is not a multiple of report_every {net.report_every}"
        )
    steps = steps_per_epoch(cases.size(examples[0]), net.batch_size)
    return steps, net.epochs // net.report_every, net.report_every * passes


def _sample_input(examples: Sequence[Examples] | Stream, gather: Gather) -> Array:
    """An input `[1, ...]` of zeros, for its shape and dtype."""
    if isinstance(examples, Stream):
        return jnp.zeros((1, *examples.inputs.shape), examples.inputs.dtype)
    inputs = jax.eval_shape(gather, examples[0], jax.ShapeDtypeStruct((1,), jnp.int32))["inputs"]
    return jnp.zeros(inputs.shape, inputs.dtype)


def _advance(
    net: ConfigDict,
    step: train_step.TrainStep,
    mesh: Any,
    examples: Sequence[Examples] | Stream,
    variants: int,
    unit_passes: int,
    cases: Cases,
    keys: Array,
    hyper: train_step.Hyper,
) -> loop.Advance:
    """What trains one unit: epochs of the resident examples, or a block of the stream."""
    shard = sharding.shard_batch(mesh, net.batch_size)
    if isinstance(examples, Stream):
        return stream.make_advance(
            sharding.compile_epoch(examples.make_run(step, shard), mesh, examples.per_member),
            examples.open_blocks,
            lambda block: examples.put(block, mesh),
            keys,
            hyper,
        )
    fields, per_member = _stack(examples, variants)
    run_epoch = make_epoch(
        step,
        net.batch_size,
        passes=unit_passes,
        shard_batch=shard,
        gather=cases.gather,
        draw=cases.draw,
        size=cases.size,
    )
    compiled = sharding.compile_epoch(run_epoch, mesh, per_member)
    resident = sharding.put_examples(fields, mesh, per_member)
    return lambda states, unit: compiled(states, resident, keys, hyper, {})


def _write_curve(path: Path, history: list[loop.Record], unit_epochs: float) -> None:
    names = [name for name in history[-1] if name not in ("unit", "seconds", "step")]
    curve = {name: [record[name] for record in history] for name in names}
    epochs = [record["unit"] * unit_epochs for record in history]
    write_json(path, {"epoch": epochs, **curve})


def build_model(
    net: ConfigDict, num_classes: int, byte: tuple[float, float] = (0.0, 255.0)
) -> models.Model:
    """The net of a config section; `byte` as for `models.mlp`."""
    return models.mlp(
        net.hidden, num_classes, net.input_dropout, net.hidden_dropout, dtype_of(net), byte
    )


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def dtype_of(net: ConfigDict) -> Any:
    """The dtype that a config section names."""
    if net.dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {net.dtype!r}")
    return DTYPES[net.dtype]


def build_optimizer(
    net: ConfigDict, steps: int, epochs: int
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config section, for `epochs` of `steps` each."""
    schedule = optimizers.cosine(steps * epochs, min(net.warmup_epochs, epochs // 2) * steps)
    if net.optimizer == "adam":
        return optimizers.adam(schedule, net.max_norm)
    if net.optimizer == "sgd":
        return optimizers.sgd(schedule, net.momentum, net.max_norm)
    if net.optimizer == "dropout_2012":
        return optimizers.dropout_2012(steps, net.max_norm)
    raise UserError(f"optimizer must be adam, sgd or dropout_2012, not {net.optimizer!r}")


def _stack(
    examples: Sequence[Examples], variants: int
) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
    """Every seed's examples as fields `[N, ...]` that all share, or `[M, N, ...]` of their own."""
    fields, per_member = {}, {}
    for name, first in examples[0].items():
        arrays = [example[name] for example in examples]
        per_member[name] = not all(
            array is first or np.array_equal(array, first) for array in arrays
        )
        fields[name] = np.concatenate([np.stack(arrays)] * variants) if per_member[name] else first
    return fields, per_member


def _member_keys(seeds: Sequence[int], name: str, variants: int) -> tuple[Array, Array]:
    """Keys `[M]` for initial weights and for training; a seed's variants share theirs."""
    salt = zlib.crc32(name.encode())
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), salt) for seed in seeds])
    init, train = jax.vmap(jax.random.split, out_axes=1)(jnp.concatenate([keys] * variants))
    return init, train


def _hyper(
    net: ConfigDict, variants: Sequence[Mapping[str, float]], seeds: int
) -> train_step.Hyper:
    """Traced numbers `[M]`: the config section's own, where a variant doesn't say otherwise."""
    names = {"learning_rate", *(key for variant in variants for key in variant)}
    return {
        name: jnp.repeat(
            jnp.asarray([variant.get(name, net.get(name)) for variant in variants], jnp.float32),
            seeds,
        )
        for name in names
    }


def _evaluator(
    model: models.Model, evaluation: Evaluation, cases: Cases, mesh: Any
) -> Callable[[train_step.TrainState], dict[str, Array]]:
    @jax.jit
    def count(params: models.Params, own: train_step.Batch, shared: train_step.Batch) -> Array:
        return jax.vmap(
            lambda member, own: cases.count_errors(model, member, {**own, **shared}),
        )(params, own)

    sets = {name: _own_and_shared(examples, mesh) for name, examples in evaluation.items()}

    def evaluate(states: train_step.TrainState) -> dict[str, Array]:
        return {
            name: processes.settle(count(states.params, *parts)) for name, parts in sets.items()
        }

    return evaluate


def _own_and_shared(
    examples: Examples | Sequence[Examples], mesh: Any
) -> tuple[train_step.Batch, train_step.Batch]:
    """On the devices: the fields that each member has of its own `[M, ...]`, and those of all."""
    fields, per_member = _stack([examples] if isinstance(examples, Mapping) else examples, 1)
    arrays = sharding.put_examples(fields, mesh, per_member)
    own = {name: array for name, array in arrays.items() if per_member[name]}
    return own, {name: array for name, array in arrays.items() if not per_member[name]}
