"""The train step: pure, and the same for teachers, baselines, students and specialists.

Only the loss differs; `step_losses` has those that are ready. The teacher's soft targets are fields of
the batch: its logits "teacher_logits" `[B, C]`, or the three `soft_targets.TOP_K_FIELDS` with a few of
its probabilities. They are joined from a store (`soft_targets.attach`), or added in the step by a frozen
teacher (`online_teacher`). With very many classes, the teachers' last hidden activations can take their
place (`online_teacher_hidden`).
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from distill_jax import batches, fused_loss, layers, members, metrics, models, ramps, ranges
from distill_jax.errors import UserError
from distill_jax.models import Model, Params, Variables

Batch = dict[str, Any]
"""Fields of B examples: "id" [B], "inputs" [B, ...] or a tree of such arrays, "label" int32 [B], below 0
where unknown (see `batches.known_labels`); by need "label_known" bool [B] and "teacher_logits" float32
[B, C]; or "teacher_ids" uint [B, k], "teacher_probabilities" [B, k] (or [B, 1] for all k) and
"teacher_tail" float32 [B]; or "teacher_hidden" [B, M, D]. Soft targets need no labels. Labels and soft
targets of sequences are [B, T] and [B, T, C].

A model with `activations` has the step add "student_activations", arrays [B, ...] by name, for the
loss, where it isn't fused; `online_teacher` adds "teacher_activations".

"weight" [B], or [B, T] of sequences, at least 0: the step's mean is sum(weight * loss) / sum(weight),
and its metrics count each example as its weight. Where it is 0, as for padding, labels and soft targets
may be anything; inputs must be finite, and count only in what a model computes of a whole batch."""

Constants = Any
"""A tree of arrays that are the same for all examples, such as {"teacher": parameters}. Traced, so that
they are neither compiled into the program nor cut up with the batch."""


Hyper = Mapping[str, Any]
"""Traced float32 scalars: "learning_rate", and what the loss reads ("temperature", "hard_weight", by
need "teacher_temperature"). One may be a ramp {"from", "to", "steps"} of three: `ramps.at_step`."""

Loss = Callable[[Array, Batch, Hyper, Constants], Array]
"""`(logits [B, C], batch, hyper, constants) -> [B]`."""

Transform = Callable[[Batch, Array, Constants], Batch]
"""`(batch, key, constants) -> batch`, run on the device inside the step: jitter, an online teacher."""


class Fused(NamedTuple):
    """A loss that the step computes together with the output layer, without `[B, C]` (`fused_loss`).

    loss: of logits. rows and over: as for `fused_loss.mean_loss`. output: the name of the output layer
    in the model's params, at any depth.
    """

    loss: Loss
    rows: int | None = None
    over: fused_loss.Over = fused_loss.on_one_device
    output: str = layers.OUTPUT


class TrainState(NamedTuple):
    """All that training changes, and exactly what a checkpoint holds.

    model_state: of the model (`models.Variables`), no matter of the optimizer; () if it has none.
    """

    step: Array
    params: Params
    opt_state: optax.OptState
    model_state: Any = ()

    @property
    def variables(self) -> Params | Variables:
        """What the model is applied to: the params, with its state if it has one."""
        return models.join(self.params, self.model_state)


class TrainStep(Protocol):
    """`(state, batch, key, hyper, constants) -> (state, metrics)`."""

    def __call__(  # noqa: D102
        self,
        state: TrainState,
        batch: Batch,
        key: Array,
        hyper: Hyper,
        constants: Constants = None,
        /,
    ) -> tuple[TrainState, dict[str, Array]]: ...


def init_state(
    model: Model, optimizer: optax.GradientTransformation, key: Array, inputs: Array
) -> TrainState:
    """A fresh state at step 0; `inputs` is any batch `[B, ...]` of the right shape."""
    return state_of(model.init(key, inputs), optimizer)


def state_of(variables: Params | Variables, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 that starts from given params, or `Variables` of a model with state."""
    params, model_state = models.split(variables)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), model_state)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    loss: Loss | Fused,
    *,
    transforms: Sequence[Transform] = (),
    micro_batches: int = 1,
    schedules: Mapping[str, ramps.Schedule] = types.MappingProxyType({}),
    axis_name: str | None = None,
) -> TrainStep:
    """Builds `step(state, batch, key, hyper, constants=None) -> (state, metrics)`.

    The step's randomness is `key` folded with the step's number, so a resumed run needs no saved key.

    Args:
        model: in training mode; `loss` sees its logits.
        optimizer: from `distill_jax.optimizers`; receives `hyper["learning_rate"]`.
        loss: per-example values; the step minimises their mean over the whole batch, weighted if the
            batch has a "weight". They must not be divided by sums over the batch, such as that of a
            mask: a micro-batch or a device has another sum. `Fused` for very many classes.
        transforms: applied to the batch in turn, each with a key of its own.
        micro_batches: parts into which the batch is cut to save memory; the gradient is their mean.
            A model's state goes through them in turn: BatchNorm takes the statistics of each part.
        schedules: numbers that are functions of the step, in place of those of `hyper`.
        axis_name: the mapped axis to average over when the step runs under `pmap` or `shard_map`;
            None in the global view of `jit`, where the mean is already over all devices. So BatchNorm
            takes the statistics of the whole batch under `jit`, and of each device's part here, where
            the states are averaged.

    Returns:
        The step; its metrics are sums over the batch: "loss" float32 and "examples" int32; "errors" and
        "count", of known labels, int32, if the batch has labels. With weights all are sums of weights,
        float32.

    Raises:
        UserError: for a fused loss of a model without `hidden`. When called, for what the batch or
            `hyper` lacks, for micro-batches of a field that is not `[B, ...]`, and for a model whose
            new state is not like the old one.
    """
    ranges.check(micro_batches=micro_batches)
    mean_loss = _mean(model, loss)

    def gradient(params: Params, model_state: Any, batch: Batch, key: Array, shared: _Shared):
        found = jax.value_and_grad(mean_loss, has_aux=True)(params, model_state, batch, key, shared)
        (_, (sums, model_state)), grads = found
        return model_state, (grads, sums)

    def step(
        state: TrainState, batch: Batch, key: Array, hyper: Hyper, constants: Constants = None, /
    ) -> tuple[TrainState, dict[str, Array]]:
        hyper = ramps.at_step(hyper, state.step, schedules)
        key = jax.random.fold_in(key, state.step)
        if axis_name is not None:  # every device draws its own dropout masks and shifts
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        batch, dropout_key = _transform(transforms, batch, key, constants)
        shared = _Shared(hyper, constants, _mean_weight(batch, micro_batches, axis_name))
        own_gradient = functools.partial(gradient, state.params, shared=shared)
        if micro_batches == 1:
            model_state, (grads, sums) = own_gradient(state.model_state, batch, dropout_key)
        else:
            model_state, (grads, sums) = _accumulate(
                own_gradient, micro_batches, state.model_state, batch, dropout_key
            )
        if axis_name is not None:
            grads, sums = jax.lax.pmean(grads, axis_name), jax.lax.psum(sums, axis_name)
            model_state = jax.tree.map(functools.partial(_average, axis_name), model_state)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, learning_rate=number(hyper, "learning_rate")
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, model_state), sums

    return step


def make_loss_step(
    model: Model,
    loss: Loss | Fused,
    *,
    transforms: Sequence[Transform] = (),
    schedules: Mapping[str, ramps.Schedule] = types.MappingProxyType({}),
) -> TrainStep:
    """Builds a step that changes nothing and measures the loss, the model in evaluation mode.

    Arguments, metrics and errors as for `make_train_step`.
    """
    mean_loss = _mean(model, loss)

    def step(
        state: TrainState, batch: Batch, key: Array, hyper: Hyper, constants: Constants = None, /
    ) -> tuple[TrainState, dict[str, Array]]:
        batch, _ = _transform(transforms, batch, key, constants)
        hyper = ramps.at_step(hyper, state.step, schedules)
        shared = _Shared(hyper, constants, _mean_weight(batch))
        _, (sums, _) = mean_loss(state.params, state.model_state, batch, None, shared)
        return state, sums

    return step


def _transform(
    transforms: Sequence[Transform], batch: Batch, key: Array, constants: Constants
) -> tuple[Batch, Array]:
    """The batch with all transforms applied, and a key for dropout."""
    dropout_key, *keys = jax.random.split(key, 1 + len(transforms))
    for transform, transform_key in zip(transforms, keys, strict=True):
        batch = transform(batch, transform_key, constants)
    return batch, dropout_key


class _Shared(NamedTuple):
    """What all examples of a batch share. weight: what their sum is divided by, None without weights."""

    hyper: Hyper
    constants: Constants
    weight: Any


def _mean_weight(batch: Batch, parts: int = 1, axis_name: str | None = None) -> Array | None:
    """The batch's weight, as a mean over micro-batches and mapped devices, whose gradients are averaged.

    So each example counts the same, however much of the batch's weight its own part has.
    """
    weight = batches.weights(batch)
    if weight is None:
        return None
    total = jnp.sum(weight) / parts
    total = total if axis_name is None else jax.lax.pmean(total, axis_name)
    return jnp.where(total == 0, 1.0, total)  # of padding alone the mean is 0


def _mean(model: Model, loss: Loss | Fused) -> Any:
    """`(params, model state, batch, key, shared) -> (mean loss, (metrics, new state))`.

    In training mode with a key, in evaluation mode if it is None.
    """
    return _fused_mean(model, loss) if isinstance(loss, Fused) else _dense_mean(model, loss)


def _dense_mean(model: Model, loss: Loss) -> Any:
    loss = _weighted(loss)
    output = "activations" if model.activations else "apply"

    def mean_loss(
        params: Params, model_state: Any, batch: Batch, key: Array | None, shared: _Shared
    ):
        variables = models.join(params, model_state)
        outputs, model_state = models.run(model, variables, batches.inputs_of(batch), key, output)
        logits, activations = outputs if model.activations else (outputs, {})
        batch = {**batch, **({"student_activations": activations} if model.activations else {})}
        values = loss(logits, batch, shared.hyper, shared.constants)
        sums = _sums(values, jnp.argmax(logits, axis=-1), batch)
        weight = batches.weights(batch)
        if weight is None:
            return jnp.mean(values), (sums, model_state)
        total = shared.weight * (values.size // weight.size)
        return sums["loss"] / total, (sums, model_state)

    return mean_loss


def _fused_mean(model: Model, fused: Fused) -> Any:
    if model.hidden is None:
        raise UserError(
            "a loss can't be fused with the output layer of a model without `hidden`: give it one, "
            f"which makes the activations that the layer {fused.output!r} takes"
        )
    own = _weighted(fused.loss)

    def loss(logits: Array, fields: Batch, shared: _Shared) -> Array:
        return own(logits, fields, shared.hyper, shared.constants)

    def mean_loss(
        params: Params, model_state: Any, batch: Batch, key: Array | None, shared: _Shared
    ):
        variables = models.join(params, model_state)
        hidden, model_state = models.run(model, variables, batches.inputs_of(batch), key, "hidden")
        # A loss of logits has no use for the inputs, and they need not be cut into chunks.
        fields = {name: field for name, field in batch.items() if name != "inputs"}
        weight = batches.weights(batch)
        mean, (values, predicted) = fused_loss.mean_loss(
            loss,
            hidden,
            layers.find(params, fused.output),
            fields,
            shared,
            weights=None if weight is None else weight / shared.weight,
            rows=fused.rows,
            over=fused.over,
        )
        return mean, (_sums(values, predicted, batch), model_state)

    return mean_loss


def _weighted(loss: Loss) -> Loss:
    """The loss, 0 and without a gradient where the weight is 0, whatever the example's fields hold.

    So the logits are replaced too: 0 times the gradient of what is not finite would be NaN.
    """

    def values(logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None) -> Array:
        weight = batches.weights(batch)
        if weight is None:
            return loss(logits, batch, hyper, constants)
        logits = jnp.where(batches.spread(weight, logits) == 0, 0.0, logits)
        found = loss(logits, batch, hyper, constants)
        return jnp.where(batches.spread(weight, found) == 0, 0.0, found)

    return values


def _average(axis_name: str, leaf: Array) -> Array:
    """The mean over devices of what has one; counters are the same on all."""
    return jax.lax.pmean(leaf, axis_name) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _sums(values: Array, predicted: Array, batch: Batch) -> dict[str, Array]:
    """The step's metrics."""
    labels, weight = batches.known_labels(batch), batches.weights(batch)
    counts = {} if labels is None else metrics.prediction_counts(predicted, labels, weight)
    if weight is None:
        examples = jnp.asarray(values.size, jnp.int32)
        return {"loss": jnp.sum(values), "examples": examples, **counts}
    weight = batches.spread(weight, values)
    return {"loss": jnp.sum(weight * values), "examples": jnp.sum(weight), **counts}


def make_eval_step(model: Model) -> Callable[[Params | Variables, Batch], dict[str, Array]]:
    """Builds `evaluate(variables, batch) -> {"errors", "count"}`, the model in evaluation mode.

    The count is of known labels, or their weight.
    """

    def evaluate(variables: Params | Variables, batch: Batch) -> dict[str, Array]:
        logits = model.apply(variables, batches.inputs_of(batch))
        return metrics.error_counts(logits, batches.labels_of(batch), batches.weights(batch))

    return evaluate


def online_teacher(apply: Callable[[Params, Array], Any]) -> Transform:
    """A transform that adds a frozen teacher's logits, for inputs that are augmented in the step.

    What it is applied to, `Net.params`, is `constants["teacher"]`.

    Args:
        apply: `(variables, inputs [B, ...]) -> logits [B, C]`, in evaluation mode: `model.apply`. Or
            `model.activations`, which adds "teacher_activations" too.
    """

    run = members.shared(apply)

    def add_logits(batch: Batch, key: Array, constants: Constants) -> Batch:
        (params,) = batches.take(
            constants, ("teacher",), "the constants have", "hand it to the step"
        )
        found = run(*jax.lax.stop_gradient((params, batch["inputs"])))
        logits, named = found if isinstance(found, tuple) else (found, None)
        more = {} if named is None else {"teacher_activations": named}
        return {**batch, "teacher_logits": logits, **more}

    return add_logits


def online_teacher_hidden(hidden: Callable[[Params, Array], Array]) -> Transform:
    """A transform that adds frozen teachers' last hidden activations, for `hidden_teacher_loss`.

    With `Fused`, their logits are made for one chunk of examples at a time. The teachers' parameters are
    `constants["teacher"]`, their output layers `constants["teacher_layer"]`.

    Args:
        hidden: `(parameters, inputs [B, ...]) -> [B, M, D]`, in evaluation mode.
    """

    def add_hidden(batch: Batch, key: Array, constants: Constants) -> Batch:
        (params,) = batches.take(
            constants, ("teacher",), "the constants have", "hand it to the step"
        )
        return {**batch, "teacher_hidden": jax.lax.stop_gradient(hidden(params, batch["inputs"]))}

    return add_hidden


def number(hyper: Hyper, name: str) -> Array:
    """One of the numbers of `hyper`, or a UserError that it is missing."""
    return batches.take(hyper, (name,), "hyper has", "hand that number to the step")[0]


def _accumulate(
    gradient: Any, parts: int, model_state: Any, batch: Batch, key: Array
) -> tuple[Any, tuple[Params, Any]]:
    """The last state, mean gradient and summed metrics of `parts` equal parts of the batch in turn."""
    size = batches.count_rows(batches.inputs_of(batch))
    if size % parts:
        raise UserError(f"a batch of {size} can't be cut into {parts} equal micro-batches")
    batches.check_rows(batch, size, "micro-batches are cut from a batch of")
    # Every parts-th example: a piece has some of each device, where a run of them would be sent about.
    pieces = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(size // parts, parts, *x.shape[1:]), 1, 0), batch
    )

    def add(state_and_total: Any, piece_and_key: tuple[Batch, Array]) -> tuple[Any, None]:
        model_state, total = state_and_total
        model_state, found = gradient(model_state, *piece_and_key)
        return (model_state, jax.tree.map(jnp.add, total, found)), None

    first = jax.tree.map(lambda x: x[0], pieces)
    _, found = jax.eval_shape(gradient, model_state, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)
    keys = jax.random.split(key, parts)
    (model_state, (grads, sums)), _ = jax.lax.scan(add, (model_state, zeros), (pieces, keys))
    return model_state, (jax.tree.map(lambda g: g / parts, grads), sums)
