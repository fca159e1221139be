"""The forms that a specialist's output can have (sections 5.2 and 6.1), as plain data.

All start as their generalist, are trained on batches that are half special, and are corrected for that
afterwards.

- "unit": S special classes and one output unit for the dustbin, as in the paper.
- "logsumexp": the generalist's whole output layer; the dustbin's logit is the log-sum-exp of the
  logits that it stands for, so the specialist starts as exactly the generalist.
- "full_hard", "full_soft": all C classes and no dustbin; the other classes are trained with labels, or
  with the generalist's soft targets (section 6.1).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax import train_step
from distill_jax.epochs import Gather
from distill_jax.errors import UserError
from distill_jax.models import Model, Params
from distill_jax.specialists import enrichment
from distill_jax.train_step import Batch


class Kind(NamedTuple):
    """How specialists of a form are made, trained and read.

    outputs: `(S, C) -> int`, of the network. start: `(generalist's params, class_set [S], C) -> params`.
    loss: sees the network's logits. add: `(batch, class_set [S], targets [C], teacher) -> batch`, what
    the loss needs besides. read: `(network's logits, class_set, correction) -> logits` corrected:
    `[..., S + 1]`, or `[..., C + 1]` with a dustbin of -inf where there is none.
    """

    outputs: Callable[[int, int], int]
    start: Callable[[Params, Array, int], Params]
    loss: train_step.Loss
    add: Callable[[Batch, Array, Array, Callable[[Array], Array]], Batch]
    read: Callable[[Array, Array, Array], Array]
    has_dustbin: bool = True


Teacher = Callable[[Array], Array]


def _map_labels(batch: Batch, class_set: Array, targets: Array, teacher: Teacher) -> Batch:
    return enrichment.to_dustbin(batch, targets)


def _name_set(batch: Batch, class_set: Array, targets: Array, teacher: Teacher) -> Batch:
    rows = jnp.broadcast_to(class_set, (len(batch["label"]), len(class_set)))
    return {**batch, "class_set": rows}


def _ask_generalist(batch: Batch, class_set: Array, targets: Array, teacher: Teacher) -> Batch:
    special = targets[batch["label"]] < len(class_set)
    logits = jax.lax.stop_gradient(teacher(batch["inputs"]))
    return {**batch, "is_special": special, "teacher_logits": logits}


def _read_full(logits: Array, class_set: Array, correction: Array) -> Array:
    corrected = enrichment.correct_others(logits, class_set, correction)
    nothing = jnp.full((*corrected.shape[:-1], 1), -jnp.inf)
    return jnp.concatenate([corrected, nothing], axis=-1)


def _read_collapsed(logits: Array, class_set: Array, correction: Array) -> Array:
    return enrichment.correct_dustbin(enrichment.collapse(logits, class_set), correction)


KINDS = {
    "unit": Kind(
        lambda size, classes: size + 1,
        enrichment.reduce_output,
        train_step.label_loss,
        _map_labels,
        lambda logits, class_set, correction: enrichment.correct_dustbin(logits, correction),
    ),
    "logsumexp": Kind(
        lambda size, classes: classes,
        lambda params, class_set, classes: params,
        enrichment.collapsed_loss,
        _name_set,
        _read_collapsed,
    ),
    "full_hard": Kind(
        lambda size, classes: classes,
        lambda params, class_set, classes: params,
        train_step.label_loss,
        lambda batch, class_set, targets, teacher: batch,
        _read_full,
        has_dustbin=False,
    ),
    "full_soft": Kind(
        lambda size, classes: classes,
        lambda params, class_set, classes: params,
        enrichment.full_softmax_loss,
        _ask_generalist,
        _read_full,
        has_dustbin=False,
    ),
}


def kind_of(name: str) -> Kind:
    """The kind of that name."""
    if name not in KINDS:
        raise UserError(
            f"specialists.kind and soft.kinds must be of {', '.join(KINDS)}, not {name!r}"
        )
    return KINDS[name]


def make_gather(kind: Kind, model: Model) -> Gather:
    """Batches of one specialist: shared "inputs" and "label" `[N]`, its "class_set" and "targets".

    `model` with the examples' "generalist" is the teacher.
    """

    def gather(examples: Batch, rows: Array) -> Batch:
        batch = {"inputs": examples["inputs"][rows], "label": examples["label"][rows]}
        return kind.add(
            batch,
            examples["class_set"],
            examples["targets"],
            lambda inputs: model.apply(examples["generalist"], inputs),
        )

    return gather
