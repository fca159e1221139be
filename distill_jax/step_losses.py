"""What a step minimises: losses as functions of the logits, the batch, `hyper` and the constants.

Each takes the fields that it needs from the batch, and its numbers from `hyper`. Its values are `[B]`,
one for each example, as `train_step.make_train_step` takes them (`train_step.Loss`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax import (
    batches,
    later_losses,
    losses,
    multi_label,
    shapes,
    soft_targets,
    top_k_losses,
)
from distill_jax.batches import known_labels, labels_of, take
from distill_jax.errors import UserError
from distill_jax.train_step import Batch, Constants, Hyper, Loss, number


def label_loss(logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None) -> Array:
    """Cross-entropy with the labels: teachers and baselines. An unknown label adds 0."""
    return losses.hard_cross_entropy(logits, labels_of(batch))


def distillation_loss(
    logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None
) -> Array:
    """The paper's objective at `hyper["temperature"]` and `hyper["hard_weight"]`.

    Where labels are unknown, or the batch has none, it is the soft term alone, with the same weight. The
    paper has one temperature. With `hyper["teacher_temperature"]` the soft targets are made at that one;
    the student's is "temperature", and its square the factor of the soft term.
    """
    targets = losses.softmax(_teacher_logits(batch), teacher_temperature(hyper))
    return _distillation(logits, targets, batch, hyper)


def top_k_distillation_loss(tail_weights: ArrayLike | None = None) -> Loss:
    """The paper's objective with targets of which the batch has the k largest.

    The student's temperature is `hyper["temperature"]`. The targets' is the one of their store, for
    which `soft_targets.attach` was asked: the same one, unless you mean another.

    Args:
        tail_weights: `[C]`, how the other classes share the rest: those of the store at
            this temperature. None for equal shares.
    """
    weights = None if tail_weights is None else jnp.asarray(tail_weights, jnp.float32)

    def loss(logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None) -> Array:
        ids, probabilities, tail = take(
            batch, soft_targets.TOP_K_FIELDS, "the batch has", "join them with soft_targets.attach"
        )
        return top_k_losses.distillation(
            logits,
            ids,
            probabilities,
            tail,
            known_labels(batch),
            temperature=number(hyper, "temperature"),
            hard_weight=number(hyper, "hard_weight"),
            tail_weights=weights,
        )

    return loss


def hidden_teacher_loss(mean: soft_targets.Mean = "arithmetic") -> Loss:
    """The paper's objective with the mean of M teachers, made of their last hidden activations.

    Reads the batch's "teacher_hidden" `[B, M, D]`, and `constants["teacher_layer"]`: {"kernel"
    `[M, D, C]`, "bias" `[M, C]`}.

    Args:
        mean: of their distributions at the temperature of `distillation_loss`.
    """

    def loss(logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None) -> Array:
        how = "add train_step.online_teacher_hidden to the step's transforms"
        (hidden,) = take(batch, ("teacher_hidden",), "the batch has", how)
        (layer,) = take(constants, ("teacher_layer",), "the constants have", "hand it to the step")
        temperature = teacher_temperature(hyper)
        targets = soft_targets.mean_probs_of_hidden(hidden, layer, temperature, mean)
        return _distillation(logits, targets, batch, hyper)

    return loss


def shared_classes_loss(
    logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None
) -> Array:
    """`distillation_loss` whose soft term is of the classes that the teacher has.

    A class that the teacher lacks, its logit is -inf (`soft_targets.map_classes`), has no part in the
    student's softmax of this term: its value and gradients are those of a student without the class.
    The labels' term is of all classes. (`distillation_loss` takes it for a class of probability 0.)
    """
    teacher, temperature = _teacher_logits(batch), number(hyper, "temperature")
    targets = losses.softmax(teacher, teacher_temperature(hyper))
    soft = losses.soft_cross_entropy(_shared(logits, teacher), targets, temperature)
    return losses.with_labels(soft, logits, known_labels(batch), number(hyper, "hard_weight"))


def label_modified_loss(
    logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None
) -> Array:
    """Cross-entropy with soft targets that the labels modified by `hyper["hard_weight"]`."""
    temperature = number(hyper, "temperature")
    targets = losses.label_modified(
        losses.softmax(_teacher_logits(batch), teacher_temperature(hyper)),
        labels_of(batch),
        number(hyper, "hard_weight"),
    )
    return losses.soft_cross_entropy(logits, targets, temperature)


def logit_matching_loss(
    logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None
) -> Array:
    """Half the squared difference of zero-meaned logits (section 2.1)."""
    return losses.logit_matching(logits, _teacher_logits(batch), zero_mean=True)


def of_teacher_logits(objective: Callable[..., Array], *names: str) -> Loss:
    """A step's loss of one of `later_losses`, weighted with the labels by `hyper["hard_weight"]`.

    It is `losses.with_labels` of `objective(logits, teacher_logits, temperature, **numbers)`, with the
    batch's "teacher_logits" and `hyper["temperature"]`, which is the teacher's too. Classes that the
    teacher lacks, where its logit is -inf, are left out of the objective.

    Args:
        objective: a function of `later_losses`, or of the same arguments.
        names: numbers that it takes by keyword, from `hyper`.

    Examples:
        >>> from distill_jax import batches, later_losses
        >>> loss = of_teacher_logits(later_losses.jensen_shannon, "teacher_share")
        >>> batch = {"teacher_logits": jnp.array([[4.0, 2.0, 0.0]]), "label": jnp.array([-1])}
        >>> hyper = {"temperature": 2.0, "hard_weight": 0.0, "teacher_share": 0.5}
        >>> print(loss(jnp.array([[3.0, 1.0, 1.0]]), batch, hyper, None))
        [0.059]
    """

    def loss(logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None) -> Array:
        numbers = {name: number(hyper, name) for name in names}
        temperature, teacher = _one_temperature(hyper), _teacher_logits(batch)
        soft = objective(_shared(logits, teacher), teacher, temperature, **numbers)
        return losses.with_labels(soft, logits, known_labels(batch), number(hyper, "hard_weight"))

    return loss


reverse_kl_loss = of_teacher_logits(later_losses.reverse_kl)
jensen_shannon_loss = of_teacher_logits(later_losses.jensen_shannon, "teacher_share")
standardised_loss = of_teacher_logits(later_losses.standardised_kl)
transformed_teacher_loss = of_teacher_logits(later_losses.transformed_teacher)


def decoupled_loss(logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None) -> Array:
    """`later_losses.decoupled` at `hyper["target_weight"]`, ["other_weight"], and the labels' part."""
    labels, teacher = labels_of(batch), _teacher_logits(batch)
    soft = later_losses.decoupled(
        _shared(logits, teacher),
        teacher,
        labels,
        _one_temperature(hyper),
        target_weight=number(hyper, "target_weight"),
        other_weight=number(hyper, "other_weight"),
    )
    return losses.with_labels(soft, logits, labels, number(hyper, "hard_weight"))


def correlation_loss(
    logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None
) -> Array:
    """`later_losses.correlation` at `hyper["inter_weight"]` and ["intra_weight"], and the labels' part.

    The batch's "weight" `[B]`, if it has one, says how much an example counts in the second term. That
    is of all examples handed over: a micro-batch, or a device's part under `pmap`, has its own.

    Raises:
        UserError: at trace time, if it is fused with the output layer, chunk by chunk.
    """
    # The fields of a chunk are the batch's but for its inputs; see `train_step.Fused`.
    how = (
        "a correlation over the batch can't be fused with the output layer (Recipe.fused_logits=0)"
    )
    take(batch, ("inputs",), "the batch has", how)
    weight = batches.weights(batch)
    if weight is not None:
        weight = batches.spread(weight, logits[..., 0])
    objective = functools.partial(later_losses.correlation, weight=weight)
    loss = of_teacher_logits(objective, "inter_weight", "intra_weight")
    return loss(logits, batch, hyper, constants)


def hint_loss(student: str, teacher: str) -> Loss:
    """Half the squared distance of the student's activations from the teacher's (FitNets, Eq. 3).

    Romero et al., arXiv 1412.6550. Where their widths differ, the student's are multiplied by
    `constants["hint_projection"]` `[student's width, teacher's width]`, which is fixed; in the paper it
    is trained. Add it to another loss, times a weight of your own:

        loss = lambda *given: distillation_loss(*given) + 0.1 * hint_loss("conv", "conv")(*given)

    Args:
        student: the name of activations `[B, ..., width]` that `Model.activations` of the student gives.
        teacher: the same of the teacher; `train_step.online_teacher(model.activations)` adds them.
    """

    def loss(logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None) -> Array:
        x = _activations(batch, "student_activations", student, "give the model activations")
        how = "add online_teacher(model.activations) to the step's transforms"
        hint = _activations(batch, "teacher_activations", teacher, how)
        shapes.check(student=(x, "float ... width"), teacher=(hint, "float ... own_width"))
        size = shapes.check(logits=(logits, "float B *"))["B"]
        both = {"student_activations": x, "teacher_activations": hint}
        batches.check_rows(both, size, "logits are of")
        if x.shape[-1] != hint.shape[-1]:
            how = f"they are {x.shape[-1]} and {hint.shape[-1]} wide: hand it to the step"
            (matrix,) = take(constants, ("hint_projection",), "the constants have", how)
            shapes.check(hint_projection=(matrix, f"float {x.shape[-1]} {hint.shape[-1]}"))
            x = jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)
        difference = x.astype(jnp.float32) - jax.lax.stop_gradient(hint.astype(jnp.float32))
        return jnp.sum(jnp.square(difference), axis=range(1, x.ndim)) / 2

    return loss


def multi_label_loss(
    logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None
) -> Array:
    """`multi_label.cross_entropy` with the batch's "labels" `[B, C]`: 0 or 1, below 0 where unknown."""
    return multi_label.cross_entropy(logits, _many_labels(batch))


def multi_label_distillation_loss(
    logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None
) -> Array:
    """`multi_label.distillation` at `hyper["temperature"]` and `hyper["hard_weight"]`.

    Reads the batch's "teacher_logits" `[B, C]`, those of sigmoids, and "labels" `[B, C]` if it has them.
    """
    return multi_label.distillation(
        logits,
        multi_label.sigmoid(_teacher_logits(batch), teacher_temperature(hyper)),
        batch.get("labels"),
        number(hyper, "temperature"),
        number(hyper, "hard_weight"),
    )


def _activations(batch: Batch, field: str, name: str, how: str) -> Array:
    (named,) = take(batch, (field,), "the batch has", f"{how}, and don't fuse the loss")
    return take(named, (name,), f"{field} have", "name one of these")[0]


def _many_labels(batch: Batch) -> Array:
    return take(batch, ("labels",), "the batch has", "0 or 1 for each class, [B, C]")[0]


def teacher_temperature(hyper: Hyper) -> Array:
    """The soft targets' temperature: `hyper["teacher_temperature"]`, or else the student's."""
    own = "teacher_temperature" in hyper
    return number(hyper, "teacher_temperature" if own else "temperature")


def _one_temperature(hyper: Hyper) -> Array:
    if "teacher_temperature" in hyper:
        raise UserError(
            "hyper has teacher_temperature, but this loss has one temperature for teacher and student: "
            "leave it out"
        )
    return number(hyper, "temperature")


def _distillation(logits: Array, targets: Array, batch: Batch, hyper: Hyper) -> Array:
    return losses.distillation(
        logits,
        targets,
        known_labels(batch),
        number(hyper, "temperature"),
        number(hyper, "hard_weight"),
    )


def _shared(logits: Array, teacher_logits: Array) -> Array:
    """The logits of the classes that the teacher has, -inf for the others."""
    shapes.check(logits=(logits, "number ... C"), teacher_logits=(teacher_logits, "number ... C"))
    return jnp.where(jnp.isneginf(teacher_logits), -jnp.inf, logits)


def _teacher_logits(batch: Batch) -> Array:
    how = (
        "join them with soft_targets.attach, or add to the step's transforms train_step.online_teacher, "
        "or augment.random_view of views that were joined"
    )
    (logits,) = take(batch, ("teacher_logits",), "the batch has", how)
    return logits
