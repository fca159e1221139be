"""What specialists are held against: controls that cost as much (section 5.5, Table 3)."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from distill_jax import soft_targets
from distill_jax.models import Params
from distill_jax.nets import Net
from experiments.common.config import changed
from experiments.common.study import Context, Row
from experiments.specialists import comparison, generalists
from experiments.specialists.comparison import LONGER
from experiments.specialists.data import load_data
from experiments.specialists.table3 import gains, row_of

ENSEMBLE = "ensemble of 2 generalists at equal cost"


def longer(context: Context) -> list[Row]:
    """The generalist, trained on for as long as its specialists took."""
    start = generalists.load_all(context).params
    trained = _train_control(context, "longer", start)
    data = load_data(context.config)
    comparison.keep(context, {LONGER: comparison.right_of(trained, data.test)})
    return control_rows(context, LONGER, generalists.accuracies(trained, data), trained.seconds)


def _train_control(context: Context, name: str, start: Params | None = None) -> Net:
    config = context.config
    net = changed(config.generalist, **config.controls)
    examples = [load_data(config).train] * len(config.seeds)
    return generalists.train(context, name, net, examples, start=start)


def ensemble(context: Context) -> list[Row]:
    """The generalist and what second one the specialists' time pays for: their mean prediction."""
    data, second = load_data(context.config), _train_control(context, "second")
    measured: dict[str, list[float]] = {}
    rights: list[np.ndarray] = []
    for s in range(len(context.config.seeds)):
        generalist = generalists.load(context, s)
        for split, part in data.evaluation().items():
            first = generalist.net.logits(generalist.inputs(part["inputs"]))
            both = np.stack([first, second.member(s).logits(part["inputs"])])
            mean = soft_targets.mean_probs(jnp.asarray(both), 1.0, "arithmetic")
            right = np.asarray(mean).argmax(axis=-1) == part["label"]
            measured.setdefault(split, []).append(100.0 * float(right.mean()))
            if split == "test":
                rights.append(right)
    comparison.keep(context, {ENSEMBLE: rights})
    return control_rows(context, ENSEMBLE, measured, second.seconds)


def control_rows(
    context: Context, name: str, after: Mapping[str, Sequence[float] | np.ndarray], seconds: float
) -> list[Row]:
    """Rows of a control's accuracies by the name of the set `[seeds]`, and its relative changes."""
    config, data = context.config, load_data(context.config)
    before = generalists.accuracies(generalists.load_all(context), data)
    values = {
        f"{split}_accuracy": list(numbers)
        for split, numbers in after.items()
        if split != "validation"
    }
    for s in range(len(config.seeds)):
        changes = gains(
            {split: before[split][s] for split in after},
            {split: after[split][s] for split in after},
        )
        for metric, value in changes.items():
            values.setdefault(metric, []).append(value)
    values["training_seconds"] = [seconds / len(config.seeds)]
    return [row_of(config, name, metric, numbers, seconds) for metric, numbers in values.items()]
