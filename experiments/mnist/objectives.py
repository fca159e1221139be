"""Ways to learn from the same soft targets, at equal cost: the paper's, and those of later papers."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from distill_jax import step_losses, train_step
from experiments.common.study import Context, Row
from experiments.mnist.data import training_set_with_targets
from experiments.mnist.differences import difference_row
from experiments.mnist.nets import error_row, sizes, train


class Objective(NamedTuple):
    """An objective. numbers: its temperature and weights, where they are not the config's."""

    name: str
    row: str
    loss: train_step.Loss
    numbers: Mapping[str, float] = {}


OBJECTIVES = (
    Objective("distillation", "distilled", step_losses.distillation_loss),
    Objective("cooler", "distilled", step_losses.distillation_loss, {"temperature": 4.0}),
    Objective(
        "soft_only", "soft targets only", step_losses.distillation_loss, {"hard_weight": 0.0}
    ),
    Objective("label_modified", "label-modified soft targets", step_losses.label_modified_loss),
    Objective("logit_matching", "logit matching", step_losses.logit_matching_loss),
    # Each at the temperature and the weights of its authors.
    Objective(
        "decoupled",
        "decoupled",
        step_losses.decoupled_loss,
        {"temperature": 4.0, "target_weight": 1.0, "other_weight": 8.0},
    ),
    Objective(
        "correlation",
        "correlation (DIST)",
        step_losses.correlation_loss,
        {"temperature": 4.0, "inter_weight": 2.0, "intra_weight": 2.0},
    ),
    Objective(
        "standardised", "standardised logits", step_losses.standardised_loss, {"temperature": 2.0}
    ),
    Objective(
        "transformed",
        "transformed teacher (WTTM)",
        step_losses.transformed_teacher_loss,
        {"temperature": 4.0},
    ),
)


def objectives(context: Context) -> list[Row]:
    """The small net by each objective; all begin alike and see the same batches."""
    net, table = context.config.objectives, "mnist_objectives"
    examples = training_set_with_targets(context, net)
    rows: list[Row] = []
    for one in OBJECTIVES:
        numbers = {"temperature": net.temperature, "hard_weight": net.hard_weight, **one.numbers}
        trained = train(context, one.name, net, examples, one.loss, variants=[numbers])
        row = f"{one.row}, {sizes(net)}"
        if one.name != "logit_matching":  # it has no temperature
            row += f", T={numbers['temperature']:g}"
        rows.append(error_row(context, table, row, trained))
    first = np.array(rows[0]["values"])
    return rows + [
        difference_row(
            context.config, table, f"{row['row']}, less the first", np.array(row["values"]) - first
        )
        for row in rows[1:]
    ]
