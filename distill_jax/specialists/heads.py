"""What a specialist's outputs mean, and how they start, are trained and are read (sections 5.2, 6.1).

A specialist of S classes tells them apart and puts all others in a dustbin class. It starts as a copy of
its generalist, is trained on enriched batches, and is corrected for these (`enrichment`). Four heads:

- `UNIT`: S outputs and one unit for the dustbin: "the dustbin class" of the paper.
- `LOG_SUM_EXP`: the generalist's whole output layer; the dustbin's logit is the log-sum-exp of the
  logits that it stands for. So the specialist starts as exactly the generalist, which one unit can't:
  it is no log-sum-exp of many, least of all above few hidden units.
- `FULL_HARD` and `FULL_SOFT`: all C classes and no dustbin. The other classes are trained with labels,
  or with the generalist's soft targets (section 6.1).

For K specialists the functions here are vmapped over class sets int32 `[K, S]` of distinct classes; a
smaller set is padded with C at its end. Any other set is a UserError, unless it is traced.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax import batches, layers, losses, models, shapes, step_losses, train_step
from distill_jax.errors import UserError
from distill_jax.models import Model, Params
from distill_jax.specialists.coverage import check_class_sets
from distill_jax.train_step import Batch, Constants, Hyper, Transform


class Head(NamedTuple):
    """A form of a specialist's outputs.

    name: that files and configs call it by. outputs: `(S, C) -> int`, of the network. start:
    `(generalist's params, class_set [S], C) -> params`. labels: `(labels [N], class_set, C) -> [N]`,
    what it is trained with. loss: of the network's logits; it may read the constants "class_set" int32
    `[S]` and, where `has_teacher`, the batch's "teacher_logits" (`train_step.online_teacher`). read:
    `(logits [..., outputs], class_set, correction) -> [..., S + 1]`, corrected, the dustbin's last; or
    `[..., C + 1]` with a dustbin of -inf where the head has none.
    """

    name: str
    outputs: Callable[[int, int], int]
    start: Callable[[Params, Array, int], Params]
    labels: Callable[[Array, Array, int], Array]
    loss: train_step.Loss
    read: Callable[[Array, Array, ArrayLike], Array]
    has_dustbin: bool = True
    has_teacher: bool = False

    def transforms(self, generalist: Model) -> list[Transform]:
        """What the step needs besides: the generalist as teacher, its params `constants["teacher"]`."""
        return [train_step.online_teacher(generalist.apply)] if self.has_teacher else []


def dustbin_labels(class_set: Array, num_classes: int) -> Array:
    """The specialist's label for each of the generalist's classes.

    Args:
        class_set: int32 `[S]`, padded with C.
        num_classes: C.

    Returns:
        int32 `[C]`: a class's place in the set, or S, the dustbin, if it is not there.

    Examples:
        >>> import jax.numpy as jnp
        >>> dustbin_labels(jnp.array([1, 3]), 5).tolist()
        [2, 0, 2, 1, 2]
    """
    shapes.check(class_set=(class_set, "int S"))
    check_class_sets(class_set, num_classes)
    size = len(class_set)
    labels = jnp.full(num_classes, size, jnp.int32)
    return labels.at[class_set].set(jnp.arange(size, dtype=jnp.int32), mode="drop")


def correct_dustbin(logits: Array, correction: ArrayLike) -> Array:
    """Logits `[..., S + 1]` of a specialist with the dustbin's, the last, corrected: float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> correct_dustbin(jnp.array([1.0, 2.0]), 0.5).tolist()
        [1.0, 2.5]
    """
    shapes.check(logits=(logits, "number ... outputs"))
    return logits.astype(jnp.float32).at[..., -1].add(correction)


def correct_others(logits: Array, class_set: Array, correction: ArrayLike) -> Array:
    """The same for a specialist with a full softmax (section 6.1): all other classes are corrected.

    Args:
        logits: `[..., C]`.
        class_set: int32 `[S]`, padded with C.
        correction: scalar, from `enrichment.dustbin_correction`.

    Returns:
        float32 `[..., C]`.

    Examples:
        >>> import jax.numpy as jnp
        >>> correct_others(jnp.zeros(3), jnp.array([1]), 0.5).tolist()
        [0.5, 0.0, 0.5]
    """
    shapes.check(logits=(logits, "number ... C"), class_set=(class_set, "int S"))
    outside = jnp.broadcast_to(_outside(class_set, logits.shape[-1]), logits.shape)
    return logits.astype(jnp.float32) + jnp.where(outside, correction, 0.0)


def reduce_output(params: Params, class_set: Array, num_classes: int) -> Params:
    """The generalist's parameters with its output layer cut down to S classes and a dustbin.

    The special classes keep their logits. The dustbin's should be the log-sum-exp of the n logits that
    it stands for, which is no linear layer; it starts as their mean plus log n. That is the
    log-sum-exp's first-order expansion about equal logits: exact there, and nowhere more.

    The place of a padded class has a bias of -inf, so never any probability nor gradient. Such biases
    can't be decayed.

    Args:
        params: of a network with {"output": {"kernel": `[D, C]`, "bias": `[C]`}}; all else is kept, and
            so is the state of `models.Variables`.
        class_set: int32 `[S]`, padded with C. Without any class outside it the dustbin is -inf too.
        num_classes: C.

    Returns:
        Parameters with {"output": {"kernel": `[D, S + 1]`, "bias": `[S + 1]`}}.

    Raises:
        UserError: if there is no such output layer, or one of another number of classes.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"output": {"kernel": jnp.ones((2, 3)), "bias": jnp.arange(3.0)}}
        >>> [f"{bias:.2f}" for bias in reduce_output(params, jnp.array([2]), 3)["output"]["bias"]]
        ['2.00', '1.19']
    """
    shapes.check(class_set=(class_set, "int S"))
    params, state = models.split(params)
    layer = params.get(layers.OUTPUT, {})
    shapes.check_fields(
        layer,
        f"the generalist's layer {layers.OUTPUT!r}",
        kernel=f"float D {num_classes}",
        bias=f"float {num_classes}",
    )
    kernel, bias = layer["kernel"].astype(jnp.float32), layer["bias"].astype(jnp.float32)
    outside = _outside(class_set, num_classes)
    count = jnp.sum(outside, dtype=bias.dtype)
    shares = outside.astype(bias.dtype) / jnp.maximum(count, 1)
    dustbin_kernel = jnp.matmul(kernel, shares, precision="highest")
    dustbin_bias = jnp.dot(bias, shares, precision="highest") + jnp.log(count)
    special_kernel = jnp.take(kernel, class_set, axis=1, mode="fill", fill_value=0.0)
    special_bias = jnp.take(bias, class_set, mode="fill", fill_value=-jnp.inf)
    output = {
        "kernel": jnp.concatenate([special_kernel, dustbin_kernel[:, None]], axis=1),
        "bias": jnp.append(special_bias, dustbin_bias),
    }
    return models.join({**params, "output": output}, state)


def collapse(logits: Array, class_set: Array) -> Array:
    """Logits of all classes as those of a set and a dustbin: probabilities outside are summed.

    Args:
        logits: `[..., C]`.
        class_set: int32 `[S]`, padded with C.

    Returns:
        float32 `[..., S + 1]`: the set's, in its order (-inf where padded), and last the log-sum-exp
        of all others (-inf if there are none).

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.exp(collapse(jnp.log(jnp.array([0.25, 0.25, 0.5])), jnp.array([2]))).tolist()
        [0.5, 0.5]
    """
    shapes.check(logits=(logits, "number ... C"), class_set=(class_set, "int S"))
    logits = logits.astype(jnp.float32)
    special = jnp.take(logits, class_set, axis=-1, mode="fill", fill_value=-jnp.inf)
    outside = jnp.broadcast_to(_outside(class_set, logits.shape[-1]), logits.shape)
    # Masked before the sum, and also where it is -inf, so that no gradient is NaN if all of it is.
    others = jnp.where(outside & (logits > -jnp.inf), logits, -jnp.inf)
    dustbin = jax.nn.logsumexp(others, axis=-1)
    return jnp.concatenate([special, dustbin[..., None]], axis=-1)


def collapsed_loss(logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None) -> Array:
    """Cross-entropy of collapsed logits with the specialist's label (`dustbin_labels`).

    With lse the log-sum-exp, `lse(z) - z_y` for an example of a special class y, and
    `lse(z) - lse(z outside the set)` for any other.

    Args:
        logits: `[B, C]` of the specialist.
        batch: with "label" int32 `[B]`, of the generalist's classes; one below 0 is unknown, and adds 0.
        hyper: not read.
        constants: with "class_set" int32 `[S]`, padded with C.

    Returns:
        `[B]` float32, in nats.

    Raises:
        UserError: naming what the batch or the constants lack.

    Examples:
        Four equal classes, of which one is special: it has 1/4, the dustbin 3/4.

        >>> import jax.numpy as jnp
        >>> batch, constants = {"label": jnp.array([2, 0])}, {"class_set": jnp.array([2])}
        >>> print(jnp.exp(-collapsed_loss(jnp.zeros((2, 4)), batch, {}, constants)))
        [0.25 0.75]
    """
    shapes.check(logits=(logits, "number ... C"))
    label, class_set = _labels(batch), _get(constants, "class_set", "constants")
    targets = _map_labels(label, class_set, logits.shape[-1])
    return losses.hard_cross_entropy(collapse(logits, class_set), targets)


def full_softmax_loss(
    logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None
) -> Array:
    """Hard targets for special classes, the generalist's soft targets for all others (section 6.1).

    For specialists with a full softmax, which so keep what the generalist knows of the other classes.
    The soft targets are at `hyper["temperature"]`, and their cross-entropy is times its square.

    Args:
        logits: `[B, C]` of the specialist.
        batch: with "label" int32 `[B]`, below 0 where unknown, and "teacher_logits" `[B, C]`, the
            generalist's.
        hyper: with "temperature".
        constants: with "class_set" int32 `[S]`, padded with C.

    Returns:
        `[B]` float32, in nats.

    Raises:
        UserError: naming what the batch or the constants lack.

    Examples:
        >>> import jax.numpy as jnp
        >>> batch = {"label": jnp.array([2, 0]), "teacher_logits": jnp.zeros((2, 4))}
        >>> constants, hyper = {"class_set": jnp.array([2])}, {"temperature": jnp.float32(2)}
        >>> print(full_softmax_loss(jnp.zeros((2, 4)), batch, hyper, constants))  # log 4, 2^2 log 4
        [1.386 5.545]
    """
    shapes.check(logits=(logits, "number ... C"))
    label, class_set = _labels(batch), _get(constants, "class_set", "constants")
    temperature = train_step.number(hyper, "temperature")
    place = _map_labels(label, class_set, logits.shape[-1])
    special = (place >= 0) & (place != len(class_set))  # or a label that is no class, which is NaN
    hard = losses.hard_cross_entropy(logits, jnp.where(special, label, -1))
    of_teacher = step_losses.teacher_temperature(hyper)
    targets = losses.softmax(_get(batch, "teacher_logits", "batch"), of_teacher)
    return jnp.where(special, hard, losses.soft_cross_entropy(logits, targets, temperature))


def _map_labels(labels: Array, class_set: Array, num_classes: int) -> Array:
    """What the specialist is trained with; unknown labels stay below 0, those of no class beyond all."""
    places = dustbin_labels(class_set, num_classes)
    mapped = places.at[labels].get(mode="fill", fill_value=jnp.iinfo(jnp.int32).max)
    return jnp.where(labels >= 0, mapped, -1)


def _read_collapsed(logits: Array, class_set: Array, correction: ArrayLike) -> Array:
    return correct_dustbin(collapse(logits, class_set), correction)


def _read_full(logits: Array, class_set: Array, correction: ArrayLike) -> Array:
    corrected = correct_others(logits, class_set, correction)
    no_dustbin = jnp.full((*corrected.shape[:-1], 1), -jnp.inf)
    return jnp.concatenate([corrected, no_dustbin], axis=-1)


UNIT = Head(
    "unit",
    outputs=lambda size, num_classes: size + 1,
    start=reduce_output,
    labels=_map_labels,
    loss=step_losses.label_loss,
    read=lambda logits, class_set, correction: correct_dustbin(logits, correction),
)
LOG_SUM_EXP = Head(
    "logsumexp",
    outputs=lambda size, num_classes: num_classes,
    start=lambda params, class_set, num_classes: params,
    labels=lambda labels, class_set, num_classes: labels,
    loss=collapsed_loss,
    read=_read_collapsed,
)
FULL_HARD = LOG_SUM_EXP._replace(
    name="full_hard", loss=step_losses.label_loss, read=_read_full, has_dustbin=False
)
FULL_SOFT = FULL_HARD._replace(name="full_soft", loss=full_softmax_loss, has_teacher=True)
HEADS = {head.name: head for head in (UNIT, LOG_SUM_EXP, FULL_HARD, FULL_SOFT)}
"""By the names that files and configs have for them."""


def head_of(name: str) -> Head:
    """The head of that name; a UserError if there is none.

    Examples:
        >>> head_of("logsumexp").outputs(20, 1000)
        1000
    """
    if name not in HEADS:
        raise UserError(f"a specialist's head must be one of {', '.join(HEADS)}, not {name!r}")
    return HEADS[name]


def _outside(class_set: Array, num_classes: int) -> Array:
    """The classes that are not in a set: bool `[C]`."""
    check_class_sets(class_set, num_classes)
    return jnp.ones(num_classes, bool).at[class_set].set(False, mode="drop")


def _labels(batch: Batch) -> Array:
    shapes.check(label=(_get(batch, "label", "batch"), "int ..."))
    labels = batches.known_labels(batch)
    assert labels is not None
    return labels


def _get(fields: Any, name: str, where: str) -> Any:
    if fields is None or name not in fields:
        have = "nothing" if not fields else f"only {sorted(fields)}"
        raise UserError(f"a specialist's loss needs {name!r} in the {where}, which has {have}")
    return fields[name]
