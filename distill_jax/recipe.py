"""What a training is made of: its recipe, how its examples are read, and streams of them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import Array

from distill_jax import batches, epochs, metrics, optimizers, ranges, train_step
from distill_jax.data.stream import Block
from distill_jax.models import Model, Params, Variables
from distill_jax.train_step import Batch, Transform

Examples = Mapping[str, Any]
"""Fields `[N, ...]`."""

Optimizer = Callable[[int, int], optax.GradientTransformationExtraArgs]
"""`(steps in an epoch, epochs) -> optimizer`, of `distill_jax.optimizers`."""


def adam(steps: int, epochs: int) -> optax.GradientTransformationExtraArgs:
    """Adam, with a warm-up of a twentieth of all steps and a cosine down to 0."""
    return optimizers.adam(optimizers.cosine(steps * epochs, steps * epochs // 20))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How nets are trained.

    epochs: over the examples. batch_size: B. optimizer: made for these epochs. transforms: of each
    batch, in the step. micro_batches: parts of a batch, to save memory. fused_logits: the loss is fused
    with the output layer if a batch has at least so many logits, B x C; 0: never. report_every: epochs
    run as one program, between two evaluations. save_every: reports between two checkpoints.
    """

    epochs: int
    batch_size: int
    optimizer: Optimizer = adam
    transforms: Sequence[Transform] = ()
    micro_batches: int = 1
    fused_logits: int = 2**22
    report_every: int = 1
    save_every: int = 1

    def __post_init__(self) -> None:
        """Raises a UserError for a number that is not allowed (`ranges`)."""
        names = (
            "epochs",
            "batch_size",
            "micro_batches",
            "fused_logits",
            "report_every",
            "save_every",
        )
        ranges.check(**{name: getattr(self, name) for name in names})

    @property
    def rows_at_once(self) -> int:
        """Examples whose activations are in memory at once: those of a part of a batch."""
        return self.batch_size // self.micro_batches


FREE = ("epochs", "fused_logits", "save_every")
"""Fields of a recipe that a training's folder may differ in."""


class Reader(NamedTuple):
    """How examples are read on the device.

    gather: makes a batch of them. count_errors: `(model, variables, batch) -> int32 []`, or a float32
    sum of weights. draw and size: as for `epochs.make_epoch`. gather_evaluated: makes a batch, with its
    "inputs", of a set that errors are counted on.
    """

    gather: epochs.Gather
    count_errors: Callable[[Model, Params | Variables, Batch], Array]
    draw: epochs.Draw = epochs.shuffle
    size: Callable[[Any], int] = epochs.count_examples
    gather_evaluated: epochs.Gather = epochs.take_rows


PLAIN = Reader(
    epochs.take_rows,
    lambda model, variables, examples: train_step.make_eval_step(model)(variables, examples)[
        "errors"
    ],
)
"""Examples that are a batch already: fields `[N, ...]`."""

MULTI_LABEL = PLAIN._replace(
    count_errors=lambda model, params, examples: metrics.multi_label_counts(
        model.apply(params, examples["inputs"]), examples["labels"], batches.weights(examples)
    )["errors"]
)
"""Examples with several classes at once, "labels" `[N, C]`; errors are wrong yes or no."""


class Stream(NamedTuple):
    """Training examples that are read from disk in blocks (`distill_jax.data.stream`).

    open_blocks: the blocks from a given one on. steps: batches in each. blocks: in an epoch.
    inputs: one input's shape and dtype. put: `(block, mesh) ->` the block on the devices. per_member:
    whether a field lies there with a leading member axis, as for `sharding.compile_epoch`.
    make_run: `(step, shard_batch) ->` what trains on a block.
    """

    open_blocks: Callable[[int], Iterator[Block]]
    steps: int
    blocks: int
    inputs: jax.ShapeDtypeStruct
    put: Callable[[Block, Any], Batch]
    per_member: Mapping[str, bool]
    make_run: Callable[[train_step.TrainStep, epochs.ShardBatch], epochs.Epoch]
