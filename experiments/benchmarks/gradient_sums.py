"""What is lost when the gradients of many replicas are summed in bfloat16.

    python -m experiments.benchmarks.gradient_sums

A net with bfloat16 arithmetic on MNIST; the replicas' gradients are added one after the other, as a ring
of devices does. Prints the error of the sum, relative to that in float32, and what a training with
either has learned. The last line is the result as JSON.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import Array

from distill_jax import models, soft_targets, step_losses
from distill_jax.command import run
from distill_jax.data import images

_REPLICAS = flags.DEFINE_list("replicas", ["8", "64", "256"], "Numbers of replicas.")
_BATCH = flags.DEFINE_integer("batch_size", 1024, "Examples of a step.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 400, "Of a training.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings of each kind.", lower_bound=1)
_HIDDEN = (256, 256)
_RATE = 1e-3
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def main() -> None:
    """Measures, and prints the table and the JSON line."""
    data = images.load("embedded")
    model = models.mlp(_HIDDEN, data.num_classes, dtype=jnp.bfloat16)
    figures: dict[str, dict[str, float]] = {}
    titles = ("replicas", "sum", "error, start", "error, end", "loss", "test errors")
    print("".join(f"{title:>14}" for title in titles))
    for replicas in map(int, _REPLICAS.value):
        for name, dtype in _DTYPES.items():
            trained = [_train(model, data, replicas, dtype, seed) for seed in range(_SEEDS.value)]
            found = {key: float(np.mean([one[key] for one in trained])) for key in trained[0]}
            found["deviation"] = float(np.std([one["test_errors"] for one in trained]))
            figures[f"{replicas} {name}"] = found
            print(
                f"{replicas:14}{name:>14}{found['error_at_start']:14.2%}{found['error_at_end']:14.2%}"
                f"{found['loss']:14.4f}{found['test_errors']:9.1f} ± {found['deviation']:.1f}",
                flush=True,
            )
    result = {
        "benchmark": "gradient_sums",
        "device": jax.default_backend(),
        "batch_size": _BATCH.value,
        "steps": _STEPS.value,
        "seeds": _SEEDS.value,
        "figures": figures,
    }
    print(json.dumps(result))


def _train(
    model: models.Model, data: images.Source, replicas: int, dtype: Any, seed: int
) -> dict[str, float]:
    """The last steps' mean loss, the test errors, and the error of the first and last gradients."""
    optimizer = optax.adam(_RATE)
    params = model.init(jax.random.key(seed), jnp.asarray(data.train["inputs"][:1]))
    state = params, optimizer.init(params)
    resident = {name: jnp.asarray(data.train[name]) for name in ("inputs", "label")}
    rows = np.random.default_rng(seed).integers(
        0, len(resident["label"]), (_STEPS.value, replicas, _BATCH.value // replicas)
    )
    step = _compile_step(model, optimizer, dtype)
    losses, errors = [], []
    for own in rows:
        state, loss, error = step(state, resident, own)
        losses.append(loss)
        errors.append(error)
    logits = soft_targets.logits_over(model.apply, state[0], data.test["inputs"])
    wrong = logits.argmax(axis=-1) != data.test["label"]
    tenth = max(1, len(rows) // 10)
    return {
        "loss": float(np.mean(jax.device_get(losses[-tenth:]))),
        "test_errors": float(wrong.sum()),
        "error_at_start": float(errors[0]),
        "error_at_end": float(np.mean(jax.device_get(errors[-tenth:]))),
    }


@functools.cache
def _compile_step(model: models.Model, optimizer: Any, dtype: Any) -> Any:
    """`(state, examples, rows [R, b]) -> (state, loss, error of the summed gradient)`."""

    def mean_loss(params: Any, batch: dict[str, Array]) -> Array:
        logits = model.apply(params, batch["inputs"])
        return jnp.mean(step_losses.label_loss(logits, batch, {}))

    @jax.jit
    def step(state: Any, examples: dict[str, Array], rows: Array) -> tuple[Any, Array, Array]:
        params, moments = state

        def add(sums: Any, own: Array) -> tuple[Any, Array]:
            batch = {name: field[own] for name, field in examples.items()}
            loss, gradient = jax.value_and_grad(mean_loss)(params, batch)
            exact, narrow = sums
            exact = jax.tree.map(jnp.add, exact, gradient)
            narrow = jax.tree.map(lambda total, g: total + g.astype(dtype), narrow, gradient)
            return (exact, narrow), loss

        zeros = jax.tree.map(jnp.zeros_like, params)
        start = zeros, jax.tree.map(lambda x: x.astype(dtype), zeros)
        (exact, narrow), losses = jax.lax.scan(add, start, rows)
        summed = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
        off = optax.global_norm(jax.tree.map(jnp.subtract, summed, exact))
        mean = jax.tree.map(lambda x: x / len(rows), summed)
        updates, moments = optimizer.update(mean, moments)
        state = optax.apply_updates(params, updates), moments
        return state, jnp.mean(losses), off / optax.global_norm(exact)

    return step


if __name__ == "__main__":
    run(main)
