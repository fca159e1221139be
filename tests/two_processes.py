"""A small training run on any mesh, in this process or (as a script) in one of several.

    python -m tests.two_processes HOST:PORT,COUNT,INDEX DIRECTORY MEMBER,DATA,MODEL:UNITS ...

trains on one mesh after another, each in a folder of its own, from whatever checkpoint is there.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax import (
    checkpoints,
    loop,
    models,
    optimizers,
    processes,
    sharding,
    step_losses,
    train_step,
)
from distill_jax.epochs import make_epoch

MEMBERS, CLASSES, BATCH = 2, 16, 48
MODEL = models.mlp((32, 16), CLASSES, hidden_dropout=0.2)
OPTIMIZER = optimizers.sgd(lambda step: jax.numpy.float32(1), momentum=0.9, max_norm=2.0)


def train(mesh: Any, directory: Path, units: int) -> tuple[Any, list[loop.Record]]:
    """Parameters as NumPy arrays and the records, after so many units in all."""
    random = np.random.default_rng(0)
    examples = {
        "id": np.arange(96, dtype=np.int32),
        "inputs": random.integers(0, 256, (96, 4, 4), np.uint8),
        "label": random.integers(0, CLASSES, 96).astype(np.int32),
        "teacher_logits": random.standard_normal((MEMBERS, 96, CLASSES)).astype(np.float32),
    }
    own = {name: name == "teacher_logits" for name in examples}
    hyper = {"learning_rate": 0.05, "temperature": 3.0, "hard_weight": 0.3}
    step = train_step.make_train_step(MODEL, OPTIMIZER, step_losses.distillation_loss)
    epoch = make_epoch(step, BATCH, shard_batch=sharding.shard_batch(mesh, BATCH))
    compiled = sharding.compile_epoch(epoch, mesh, own)
    resident = sharding.put_examples(examples, mesh, own)
    keys = jax.random.split(jax.random.key(1), MEMBERS)
    numbers = {name: np.full(MEMBERS, value, np.float32) for name, value in hyper.items()}
    numbers = jax.tree.map(jax.numpy.asarray, numbers)
    states = sharding.init_members(
        lambda key: train_step.init_state(MODEL, OPTIMIZER, key, examples["inputs"][:1]), keys, mesh
    )
    with checkpoints.open_dir(directory) as manager:
        states, history = loop.fit(
            lambda states, unit: compiled(states, resident, keys, numbers, {}),
            states,
            units,
            manager=manager,
        )
    return processes.fetch(states.params), history


def main(how: str, directory: Path, runs: list[str]) -> None:
    processes.start(how)
    for number, run in enumerate(runs):
        sizes, _, units = run.partition(":")
        mesh = sharding.make_mesh(*map(int, sizes.split(",")))
        params, history = train(mesh, directory / str(number), int(units))
        if processes.is_main():
            leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(params)]
            np.save(directory / f"{number}.npy", np.concatenate(leaves))
            np.save(directory / f"{number}_loss.npy", [one["train_loss"] for one in history])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
