"""The work that `mnist_epoch` times, and our way of doing it."""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from distill_jax import sharding, step_losses, train_step
from distill_jax.data import images
from distill_jax.data.augment import jitter
from distill_jax.epochs import make_epoch, steps_per_epoch
from experiments.common.training import build_model, build_optimizer
from experiments.mnist.config import get_config

TRAIN_EXAMPLES, PIXELS, CLASSES = 60000, 28 * 28, 10
MEMBERS = 5
EPOCHS = 40  # length of the learning rate schedule
SECTIONS = {"teacher": "teacher", "student": "distilled"}  # of the config

RunEpoch = Callable[[], None]
"""Trains for one more epoch and waits until it is done."""


class Case(NamedTuple):
    """One thing to measure.

    way: ours, vmapped (several nets as one program), in_turn (several nets, one after the other),
        pytorch_eager or pytorch_compile.
    net: a key of SECTIONS.
    """

    way: str
    net: str

    @property
    def framework(self) -> str:
        """The worker that measures it."""
        return "torch" if self.way.startswith("pytorch") else "jax"

    @property
    def members(self) -> int:
        """How many nets it trains."""
        return MEMBERS if self.way in ("vmapped", "in_turn") else 1


class Work(NamedTuple):
    """How much is trained: `part` (0..1] of an epoch's steps, of `batch_size` examples each."""

    batch_size: int
    part: float

    @property
    def epoch_steps(self) -> int:
        """Steps of a whole epoch."""
        return steps_per_epoch(TRAIN_EXAMPLES, self.batch_size)

    @property
    def steps(self) -> int:
        """Steps that are run."""
        return max(1, round(self.part * self.epoch_steps))


def flops_per_example(layers: Sequence[int]) -> int:
    """Multiplications and additions of the matrix products of one training step, per example.

    A product of an a-vector with an [a, b] matrix is 2ab. Backward has two for each layer, for its
    weights and its inputs; the gradient of the images is not needed.
    """
    products = [a * b for a, b in itertools.pairwise(layers)]
    return 2 * sum(products) + 4 * sum(products) - 2 * products[0]


def layers(net: str) -> list[int]:
    """Units of a net, from its inputs to its classes."""
    return [PIXELS, *section(net).hidden, CLASSES]


def section(net: str) -> ConfigDict:
    """The default preset's section for a net."""
    return get_config()[SECTIONS[net]]


def load_examples(work: Work) -> images.Examples:
    """The training examples of these steps, with random teacher logits."""
    train = images.load("embedded").train
    logits = np.random.default_rng(0).normal(0, 5, (TRAIN_EXAMPLES, CLASSES)).astype(np.float32)
    # A whole epoch is shuffled out of all; its remainder of a batch is left out afterwards.
    size = TRAIN_EXAMPLES if work.part == 1 else work.steps * work.batch_size
    return {name: field[:size] for name, field in {**train, "teacher_logits": logits}.items()}


def start_jax(work: Work, gpu: bool) -> tuple[Callable[[Case], RunEpoch], str]:
    """How to set a case up in this process, and the name of where it runs."""
    where = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    return functools.partial(_case, work), f"jax {jax.__version__} on {where}"


def _case(work: Work, case: Case) -> RunEpoch:
    if case.way != "in_turn":
        return _program(work, case.net, case.members)(1)[0]
    nets = _program(work, case.net, 1)(case.members)

    def run() -> None:
        for run_net in nets:
            run_net()

    return run


@functools.cache
def _program(work: Work, net: str, members: int) -> Callable[[int], list[RunEpoch]]:
    """One program for all members, built as in a study; returns a function that starts runs of it."""
    config, mesh = section(net), sharding.make_mesh()
    model = build_model(config, CLASSES)
    optimizer = build_optimizer(config, work.steps, EPOCHS)
    step = train_step.make_train_step(
        model,
        optimizer,
        step_losses.label_loss if net == "teacher" else step_losses.distillation_loss,
        transforms=[jitter(config.jitter)] if config.jitter else [],
    )
    examples = load_examples(work)
    if net == "teacher":
        del examples["teacher_logits"]
    per_member = dict.fromkeys(examples, False)
    run_epoch = make_epoch(
        step, work.batch_size, shard_batch=sharding.shard_batch(mesh, work.batch_size)
    )
    compiled = sharding.compile_epoch(run_epoch, mesh, per_member)
    resident = sharding.put_examples(examples, mesh, per_member)
    names = ["learning_rate"] + ([] if net == "teacher" else ["temperature", "hard_weight"])
    hyper = {name: jnp.full(members, config[name], jnp.float32) for name in names}
    image = jnp.asarray(examples["inputs"][:1])

    def start(runs: int) -> list[RunEpoch]:
        keys = jax.random.split(jax.random.key(0), runs * members)
        states = sharding.init_members(
            lambda key: train_step.init_state(model, optimizer, key, image), keys, mesh
        )

        def part(run: int) -> RunEpoch:
            mine = slice(run * members, (run + 1) * members)
            state, my_keys = jax.tree.map(lambda leaf: leaf[mine], states), keys[mine]

            def run_once() -> None:
                nonlocal state
                state, metrics = compiled(state, resident, my_keys, hyper, {})
                jax.block_until_ready((state, metrics))

            return run_once

        return [part(run) for run in range(runs)]

    return start
