"""Small arrays and functions that the calls of the fuzz test are made of."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import (
    losses,
    models,
    optimizers,
    soft_targets,
    train_step,
)
from distill_jax.data import augment

B, C, D, K, S = 4, 6, 3, 2, 2


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, np.float32)


def ints(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


LOGITS, TARGETS, LABELS = floats(B, C), np.full((B, C), 1 / C, np.float32), ints(B)
IDS, KEPT, TAIL = np.tile(np.arange(K, dtype=np.int32), (B, 1)), floats(B, K) / K, floats(B)
SETS = np.array([[0, 1], [2, 3]], np.int32)
LAYER = {"kernel": floats(D, C), "bias": floats(C)}
BATCH = {
    "id": np.arange(B, dtype=np.int32),
    "inputs": floats(B, D),
    "label": LABELS,
    "teacher_logits": LOGITS,
}
EXAMPLES = {
    "id": np.arange(B, dtype=np.int32),
    "inputs": np.zeros((B, 8, 8), np.uint8),
    "label": LABELS,
}
VIEWS = augment.shifts(1)
HYPER = {name: jnp.float32(value) for name, value in (("temperature", 2.0), ("hard_weight", 0.5))}
MODEL = models.mlp((5,), C)
OPTIMIZER = optimizers.sgd(lambda step: 1.0)


def top_k_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, **dict(zip(soft_targets.TOP_K_FIELDS, (IDS, KEPT, TAIL), strict=True))}


def make_step(loss: Any, **options: Any) -> Callable[[Any], Any]:
    def step(batch: Any) -> Any:
        state = train_step.init_state(MODEL, OPTIMIZER, jax.random.key(0), jnp.zeros((1, D)))
        run = train_step.make_train_step(MODEL, OPTIMIZER, loss, **options)
        return run(state, batch, jax.random.key(1), {**HYPER, "learning_rate": jnp.float32(0.1)})

    return step


def loss_of_labels(logits: Any, fields: Any, constants: Any) -> Any:
    return losses.hard_cross_entropy(logits, fields["label"])


def make_store(encoding: str = "dense") -> soft_targets.Store:
    folder = Path(tempfile.mkdtemp())
    how = {} if encoding == "dense" else {"encoding": encoding, "k": K, "temperatures": 2.0}
    soft_targets.write(folder, LOGITS, soft_targets.digests(BATCH["inputs"]), teacher="t", **how)
    return soft_targets.load(folder)


def write(**arguments: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        soft_targets.write(Path(folder) / "store", teacher="t", **arguments)


def write_top_k(**arguments: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        how = {"teacher": "t", "num_classes": C}
        soft_targets.write_top_k(Path(folder) / "store", **arguments, **how)


def write_views(**arguments: Any) -> None:
    def apply(params: Any, images: Any) -> Any:
        return images.reshape(len(images), -1)[:, :C].astype(jnp.float32)

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        soft_targets.write_views(store, apply, None, views=VIEWS, teacher="t", **arguments)
