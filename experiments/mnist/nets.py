"""Trains the nets of the MNIST study, and makes rows of their errors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from distill_jax import processes, train_step
from distill_jax.data.images import Examples
from distill_jax.nets import Net
from distill_jax.trainer import Stream
from experiments.common import training
from experiments.common.config import is_brought
from experiments.common.study import Context, Row, make_row
from experiments.mnist.data import load_data, open_data


def train(
    context: Context,
    name: str,
    net: ConfigDict,
    examples: Sequence[Examples] | Stream,
    loss: train_step.Loss,
    *,
    variants: Sequence[Mapping[str, Any]] = ({},),
    passes: int = 1,
    transforms: Sequence[train_step.Transform] = (),
    seeds: Sequence[int] | None = None,
    number: int = 0,
) -> Net:
    """`training.train` for this study: counts errors on the test set and on what is held out.

    Of the config's seeds, or of other ones. `number` is the training's in the stage's random keys.
    """
    data = open_data(context.config)
    seeds = tuple(seeds or context.config.seeds)
    evaluation = {"test_errors": data.test}
    if len(data.validation["id"]):
        evaluation["validation_errors"] = data.validation
    return training.train(
        context.config,
        net,
        training.build_model(net, data.num_classes),
        examples,
        loss,
        keys=context.keys(seeds, number),
        directory=context.directory / name,
        name=name,
        seeds=seeds,
        variants=variants,
        evaluation=evaluation,
        passes=passes,
        transforms=transforms,
    )


def sizes(net: ConfigDict) -> str:
    """The hidden layers in a row's name: "2x800", or "800-400" if they differ."""
    if len(set(net.hidden)) == 1:
        return f"{len(net.hidden)}x{net.hidden[0]}"
    return "-".join(map(str, net.hidden))


def shown(number: float | Mapping[str, float]) -> str:
    """A number in a row's name, "20", or one that changes with the step, "20 to 4"."""
    if isinstance(number, Mapping):
        return f"{number['from']:g} to {number['to']:g}"
    return f"{number:g}"


def error_row(context: Context, table: str, row: str, nets: Net, paper: float | None = None) -> Row:
    """The test errors after the last epoch of one kind of net, over its seeds."""
    errors, config = nets.history[-1]["test_errors"], context.config
    paper = of_mnist(config, paper)
    return make_row(config, table, row, "test_errors", errors, seconds=nets.seconds, paper=paper)


def of_images(context: Context, what: str) -> bool:
    """Whether the set is of images that can be shifted and distorted; if not, the stage has no rows."""
    inputs = load_data(context.config).train["inputs"]
    found = inputs.dtype == np.uint8 and inputs.ndim in (3, 4)
    if not found and processes.is_main():
        print(
            f"{what}: left out, as they need images [N, H, W, ...] of bytes; "
            f"{context.config.data.source} has {inputs.dtype} {list(inputs.shape)}",
            flush=True,
        )
    return found


def of_mnist(config: ConfigDict, paper: float | None) -> float | None:
    """The paper's value, where the data are MNIST."""
    return None if is_brought(config.data.source) else paper


def errors_by_variant(nets: Net, variants: int) -> np.ndarray:
    """Test errors after the last epoch `[variants, seeds]`."""
    return np.reshape(nets.history[-1]["test_errors"], (variants, -1))
