"""The train step: pure, and the same for teachers, baselines, students and specialists.

Only the loss differs; `step_losses` has those that are ready. The teacher's soft targets are fields of
the batch: its logits "teacher_logits" `[B, C]`, or the three `soft_targets.TOP_K_FIELDS` with a few of
its probabilities. They are joined from a store (`soft_targets.attach`), or added in the step by a frozen
teacher (`online_teacher`). With very many classes, the teachers' last hidden activations can take their
place (`online_teacher_hidden`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from distill_jax import fused_loss, layers, metrics, ranges, shapes
from distill_jax.batches import check_rows
from distill_jax.errors import UserError
from distill_jax.models import Model, Params

Batch = dict[str, Any]
"""Fields of B examples: "id" [B], "inputs" [B, ...], "label" int32 [B], below 0 where unknown (see
`known_labels`); by need "label_known" bool [B] and "teacher_logits" float32 [B, C]; or "teacher_ids"
uint [B, k], "teacher_probabilities" [B, k] (or [B, 1] for all k) and "teacher_tail" float32 [B]; or
"teacher_hidden" [B, M, D]. Soft targets need no labels."""

Constants = Any
"""A tree of arrays that are the same for all examples, such as {"teacher": parameters}. Traced, so that
they are neither compiled into the program nor cut up with the batch."""


Hyper = dict[str, Array]
"""Traced float32 scalars: "learning_rate", and what the loss reads ("temperature", "hard_weight")."""

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
    """All that training changes, and exactly what a checkpoint holds."""

    step: Array
    params: Params
    opt_state: optax.OptState


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


def state_of(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 that starts from given parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    loss: Loss | Fused,
    *,
    transforms: Sequence[Transform] = (),
    micro_batches: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """Builds `step(state, batch, key, hyper, constants=None) -> (state, metrics)`.

    The step's randomness is `key` folded with the step's number, so a resumed run needs no saved key.

    Args:
        model: trained with dropout; `loss` sees its logits.
        optimizer: from `distill_jax.optimizers`; receives `hyper["learning_rate"]`.
        loss: per-example values; the step minimises their mean over the whole batch. They must not be
            divided by sums over the batch, such as that of a mask: a micro-batch or a device has another
            sum. `Fused` for very many classes.
        transforms: applied to the batch in turn, each with a key of its own.
        micro_batches: parts into which the batch is cut to save memory; the gradient is their mean.
        axis_name: the mapped axis to average over when the step runs under `pmap` or `shard_map`;
            None in the global view of `jit`, where the mean is already over all devices.

    Returns:
        The step; its metrics are sums over the batch: "loss" float32 and "examples" int32; "errors" and
        "count", of known labels, int32, if the batch has labels.

    Raises:
        UserError: for a fused loss of a model without `hidden`. When called, for what the batch or
            `hyper` lacks, and for micro-batches of a field that is not `[B, ...]`.
    """
    ranges.check(micro_batches=micro_batches)
    mean_loss = _mean(model, loss)

    def gradient(params: Params, batch: Batch, key: Array, shared: tuple[Hyper, Constants]):
        (_, sums), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, batch, key, shared)
        return grads, sums

    def step(
        state: TrainState, batch: Batch, key: Array, hyper: Hyper, constants: Constants = None, /
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        if axis_name is not None:  # every device draws its own dropout masks and shifts
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        batch, dropout_key = _transform(transforms, batch, key, constants)
        own_gradient = functools.partial(gradient, state.params, shared=(hyper, constants))
        if micro_batches == 1:
            grads, sums = own_gradient(batch, dropout_key)
        else:
            grads, sums = _accumulate(own_gradient, micro_batches, batch, dropout_key)
        if axis_name is not None:
            grads, sums = jax.lax.pmean(grads, axis_name), jax.lax.psum(sums, axis_name)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, learning_rate=number(hyper, "learning_rate")
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), sums

    return step


def make_loss_step(
    model: Model, loss: Loss | Fused, *, transforms: Sequence[Transform] = ()
) -> TrainStep:
    """Builds a step that changes nothing and measures the loss, the model in evaluation mode.

    Arguments, metrics and errors as for `make_train_step`.
    """
    mean_loss = _mean(model, loss)

    def step(
        state: TrainState, batch: Batch, key: Array, hyper: Hyper, constants: Constants = None, /
    ) -> tuple[TrainState, dict[str, Array]]:
        batch, _ = _transform(transforms, batch, key, constants)
        return state, mean_loss(state.params, batch, None, (hyper, constants))[1]

    return step


def _transform(
    transforms: Sequence[Transform], batch: Batch, key: Array, constants: Constants
) -> tuple[Batch, Array]:
    """The batch with all transforms applied, and a key for dropout."""
    dropout_key, *keys = jax.random.split(key, 1 + len(transforms))
    for transform, transform_key in zip(transforms, keys, strict=True):
        batch = transform(batch, transform_key, constants)
    return batch, dropout_key


def _mean(model: Model, loss: Loss | Fused) -> Any:
    """`(params, batch, dropout key, (hyper, constants)) -> (mean loss, the step's metrics)`."""
    return _fused_mean(model, loss) if isinstance(loss, Fused) else _dense_mean(model, loss)


def _dense_mean(model: Model, loss: Loss) -> Any:
    def mean_loss(params: Params, batch: Batch, key: Array, shared: tuple[Hyper, Constants]):
        logits = model.apply(params, _inputs(batch), dropout_key=key)
        values = loss(logits, batch, *shared)
        return jnp.mean(values), _sums(values, jnp.argmax(logits, axis=-1), batch)

    return mean_loss


def _fused_mean(model: Model, fused: Fused) -> Any:
    hidden_of = model.hidden
    if hidden_of is None:
        raise UserError(
            "a loss can't be fused with the output layer of a model without `hidden`: give it one, "
            f"which makes the activations that the layer {fused.output!r} takes"
        )

    def loss(logits: Array, fields: Batch, shared: tuple[Hyper, Constants]) -> Array:
        return fused.loss(logits, fields, *shared)

    def mean_loss(params: Params, batch: Batch, key: Array, shared: tuple[Hyper, Constants]):
        hidden = hidden_of(params, _inputs(batch), dropout_key=key)
        # A loss of logits has no use for the inputs, and they need not be cut into chunks.
        fields = {name: field for name, field in batch.items() if name != "inputs"}
        mean, (values, predicted) = fused_loss.mean_loss(
            loss,
            hidden,
            layers.find(params, fused.output),
            fields,
            shared,
            rows=fused.rows,
            over=fused.over,
        )
        return mean, _sums(values, predicted, batch)

    return mean_loss


def _sums(values: Array, predicted: Array, batch: Batch) -> dict[str, Array]:
    """The step's metrics."""
    labels = known_labels(batch)
    counts = {} if labels is None else metrics.prediction_counts(predicted, labels)
    return {
        "loss": jnp.sum(values),
        "examples": jnp.asarray(values.size, jnp.int32),
        **counts,
    }


def make_eval_step(model: Model) -> Callable[[Params, Batch], dict[str, Array]]:
    """Builds `evaluate(params, batch) -> {"errors", "count"}`, the model in evaluation mode.

    The count is of known labels.
    """

    def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
        return metrics.error_counts(model.apply(params, _inputs(batch)), labels_of(batch))

    return evaluate


def known_labels(batch: Batch) -> Array | None:
    """The batch's "label", -1 where "label_known" is false; None if it has no labels.

    Examples:
        >>> batch = {"label": jnp.array([2, 0, -1]), "label_known": jnp.array([True, False, True])}
        >>> print(known_labels(batch), known_labels({}))
        [ 2 -1 -1] None
    """
    labels, known = batch.get("label"), batch.get("label_known")
    shapes.check(label=(labels, "int? ..."), label_known=(known, "bool? ..."))
    if labels is None or known is None:
        return labels
    return jnp.where(known, labels.astype(jnp.int32), -1)


def online_teacher(apply: Callable[[Params, Array], Array]) -> Transform:
    """A transform that adds a frozen teacher's logits, for inputs that are augmented in the step.

    Its parameters are `constants["teacher"]`.

    Args:
        apply: `(parameters, inputs [B, ...]) -> logits [B, C]`, in evaluation mode: `model.apply`.
    """

    def add_logits(batch: Batch, key: Array, constants: Constants) -> Batch:
        (params,) = take(constants, ("teacher",), "the constants have", "hand it to the step")
        logits = jax.lax.stop_gradient(apply(params, batch["inputs"]))
        return {**batch, "teacher_logits": logits}

    return add_logits


def online_teacher_hidden(hidden: Callable[[Params, Array], Array]) -> Transform:
    """A transform that adds frozen teachers' last hidden activations, for `hidden_teacher_loss`.

    With `Fused`, their logits are made for one chunk of examples at a time. The teachers' parameters are
    `constants["teacher"]`, their output layers `constants["teacher_layer"]`.

    Args:
        hidden: `(parameters, inputs [B, ...]) -> [B, M, D]`, in evaluation mode.
    """

    def add_hidden(batch: Batch, key: Array, constants: Constants) -> Batch:
        (params,) = take(constants, ("teacher",), "the constants have", "hand it to the step")
        return {**batch, "teacher_hidden": jax.lax.stop_gradient(hidden(params, batch["inputs"]))}

    return add_hidden


def number(hyper: Hyper, name: str) -> Array:
    """One of the numbers of `hyper`, or a UserError that it is missing."""
    return take(hyper, (name,), "hyper has", "hand that number to the step")[0]


def _inputs(batch: Batch) -> Array:
    (inputs,) = take(batch, ("inputs",), "the batch has", "the model is applied to that field")
    shapes.check(inputs=(inputs, "any B *"))
    return inputs


def labels_of(batch: Batch) -> Array:
    """`known_labels` of a batch that must have labels; a UserError if it has none."""
    take(batch, ("label",), "the batch has", "this loss or evaluation reads it")
    labels = known_labels(batch)
    shapes.check(label=(labels, "int ..."))
    assert labels is not None
    return labels


def take(fields: Any, names: Sequence[str], what: str, how: str) -> tuple[Any, ...]:
    """Some of the fields of a batch, of `hyper` or of the constants.

    Args:
        fields: by name; None: there are none.
        names: of those that are wanted.
        what: begins the message if one is missing: "the batch has".
        how: ends it: what to do.

    Raises:
        UserError: if one is missing.
    """
    missing = [name for name in names if name not in (fields or {})]
    if missing:
        raise UserError(f"{what} no {', '.join(missing)}, only {sorted(fields or {})}: {how}")
    return tuple(fields[name] for name in names)


def _accumulate(gradient: Any, parts: int, batch: Batch, key: Array) -> tuple[Params, Any]:
    """The mean gradient and summed metrics of `parts` equal parts of the batch, one at a time."""
    size = _inputs(batch).shape[0]
    if size % parts:
        raise UserError(f"a batch of {size} can't be cut into {parts} equal micro-batches")
    check_rows(batch, size, "micro-batches are cut from a batch of")
    # Every parts-th example: a piece has some of each device, where a run of them would be sent about.
    pieces = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(size // parts, parts, *x.shape[1:]), 1, 0), batch
    )

    def add(total: Any, piece_and_key: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(*piece_and_key)), None

    first = jax.tree.map(lambda x: x[0], pieces)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, first, key)
    )
    (grads, sums), _ = jax.lax.scan(add, zeros, (pieces, jax.random.split(key, parts)))
    return jax.tree.map(lambda g: g / parts, grads), sums
