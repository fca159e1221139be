"""Checks before and after a training, of mistakes that would otherwise only show as a bad net."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jax.typing import ArrayLike

from distill_jax import ranges
from distill_jax.errors import UserError
from distill_jax.ramps import RAMP

Examples = Mapping[str, Any]
"""Fields `[N, ...]`."""


def check_numbers(hyper: Mapping[str, Any], count: int) -> None:
    """Checks what `trainer.train` is given as `hyper`, for `count` members.

    Raises:
        UserError: for a number that is not allowed (`ranges`), or that isn't one or `[count]`; for a
            ramp with other parts than `ramps.RAMP`. What functions return is not known yet.

    Examples:
        >>> check_numbers({"temperature": [2.0, 0.0]}, 2)
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: temperature is 0.0; allowed: above 0, finite
    """
    for name, value in hyper.items():
        allowed = ranges.TABLE.get(name, ranges.any_number())
        if callable(value):
            continue
        if not isinstance(value, Mapping):
            _check_number(name, value, allowed, count)
            continue
        if set(value) != set(RAMP):
            raise UserError(
                f"hyper has {name} {dict(value)}; expected a number, a function of the step, or "
                f"{', '.join(RAMP)}"
            )
        for part, number in value.items():
            allowed_here = ranges.count() if part == "steps" else allowed
            _check_number(f"{name}.{part}", number, allowed_here, count)


def _check_number(name: str, value: ArrayLike, allowed: ranges.Allowed, count: int) -> None:
    numbers = np.asarray(value)
    ranges.check_value(name, numbers, allowed)
    if numbers.shape not in ((), (count,)):
        raise UserError(
            f"hyper has {name} {list(numbers.shape)} for {count} keys; expected one number, or one for "
            "each"
        )


def check_labels(sets: Sequence[Examples], num_classes: int, what: str) -> None:
    """Checks that every known "label" is a class of the model.

    Args:
        sets: of examples; without labels there is nothing to check.
        num_classes: C, of the model's logits.
        what: the examples are, for the message.

    Raises:
        UserError: for a label of C or more, naming the first, its row, and its id if there is one.

    Examples:
        >>> check_labels([{"label": np.array([0, -1, 5])}], 6, "digits")
        >>> check_labels([{"label": np.array([0, -1, 5])}], 5, "digits")
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: digits: label 5 at row 2; the model has 5 classes, ...
    """
    for examples in {id(one): one for one in sets}.values():
        labels = np.asarray(examples.get("label", ()))
        wrong = _known(examples, labels) & (labels >= num_classes)
        if wrong.any():
            first = tuple(np.argwhere(wrong)[0].tolist())
            ids = np.asarray(examples.get("id", ()))
            name = f" (id {ids[first]})" if ids.shape == labels.shape else ""
            raise UserError(
                f"{what}: label {labels[first]} at row {_row(first)}{name}; the model has {num_classes} "
                f"classes, so labels are 0 to {num_classes - 1}, or below 0 where unknown "
                f"({wrong.sum()} of {labels.size} are beyond)"
            )


def check_evaluation(
    evaluation: Mapping[str, Examples | Sequence[Examples]], num_classes: int, what: str
) -> None:
    """`check_labels` of all sets by their names, and that each has known labels, if it has labels.

    Raises:
        UserError: as `check_labels`, or if no label of a set is known.
    """
    for name, sets in evaluation.items():
        sets = [sets] if isinstance(sets, Mapping) else sets
        check_labels(sets, num_classes, f"{what}, {name}")
        for examples in sets:
            labels = np.asarray(examples.get("label", ()))
            if labels.size and not _known(examples, labels).any():
                raise UserError(
                    f"{what}, {name}: none of the {labels.size} labels is known, so there are no errors "
                    "to count"
                )


def compare_losses(record: Mapping[str, Any], sums: Mapping[str, np.ndarray], what: str) -> None:
    """Warns if a model of one's own does far worse in evaluation than it did in training.

    Dropout and augmentation make the training loss the higher one. So a loss in evaluation of more than
    twice that, and 0.1 more, says that training changed something that the parameters don't hold.

    Args:
        record: the last one of the training (`loop.Record`).
        sums: "loss" and "examples" `[M, steps]`, of training examples in evaluation mode.
        what: the net is, for the message.
    """
    training = np.asarray(record["train_loss"])
    weight = np.sum(sums["examples"], axis=-1)
    evaluation = np.sum(sums["loss"], axis=-1) / np.where(weight > 0, weight, 1)
    worse = ~(evaluation <= training + np.abs(training) + 0.1)  # true of NaN
    if worse.any():
        m = int(worse.argmax())
        logging.warning(
            "%s: the loss is %.4g in evaluation mode, but was %.4g in training: the model may lose a "
            "state, such as BatchNorm's statistics; models.from_linen and models.from_nnx keep it",
            what,
            evaluation[m],
            training[m],
        )


def check_weights(sets: Sequence[Examples], what: str, *, all_zero: bool = False) -> None:
    """Checks each "weight" of examples: finite, at least 0, and not all 0 unless `all_zero` is allowed.

    Raises:
        UserError: naming the first that isn't, or the set that weighs nothing.

    Examples:
        >>> check_weights([{"weight": np.array([1.0, 0.0, -1.0])}], "digits")
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: digits: weight -1.0 at row 2; allowed: 0 or more, finite (1 of ...
    """
    for examples in {id(one): one for one in sets if "weight" in one}.values():
        weight = np.asarray(examples["weight"]).astype(np.float64)
        wrong = ~(np.isfinite(weight) & (weight >= 0))
        if wrong.any():
            first = tuple(np.argwhere(wrong)[0].tolist())
            raise UserError(
                f"{what}: weight {weight[first]} at row {_row(first)}; allowed: 0 or more, finite "
                f"({wrong.sum()} of {weight.size} aren't)"
            )
        if not all_zero and not weight.any():
            raise UserError(
                f"{what}: all {weight.size} weights are 0, so there is nothing to learn"
            )


def _row(place: tuple[int, ...]) -> Any:
    return place[0] if len(place) == 1 else list(place)


def _known(examples: Examples, labels: np.ndarray) -> np.ndarray:
    """Whether each label is known and has a weight."""
    found = labels >= 0
    known, weight = (
        np.asarray(examples.get("label_known", True)),
        np.asarray(examples.get("weight", 1)),
    )
    if known.shape in ((), labels.shape):
        found = found & known
    if weight.shape == labels.shape[: weight.ndim]:
        found = found & (weight != 0).reshape(weight.shape + (1,) * (labels.ndim - weight.ndim))
    return found
