"""Weights of examples: padding never changes a number, and a weight counts as so many examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh

from distill_jax import batches, models, optimizers, sharding, step_losses, train_step, trainer
from distill_jax.errors import UserError

B, T = 8, 3
FLAT = models.mlp([8], tiny.CLASSES)
OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))


def _frames(params, inputs, dropout_key=None):
    """The same net on every frame of sequences `[B, T, ...]`."""
    return jax.vmap(lambda x: FLAT.apply(params, x), 1, 1)(inputs)


def _hidden_frames(params, inputs, dropout_key=None):
    return jax.vmap(lambda x: FLAT.hidden(params, x), 1, 1)(inputs)


FRAMES = models.Model(lambda key, x: FLAT.init(key, x[:, 0]), _frames, _hidden_frames)


def batch_of(model, seed=0):
    shape = (B,) if model is FLAT else (B, T)
    random = np.random.default_rng(seed)
    return {
        "inputs": random.integers(0, 256, (*shape, 4, 4), np.uint8),
        "label": random.integers(-1, tiny.CLASSES, shape).astype(np.int32),
        "teacher_logits": 3 * random.standard_normal((*shape, tiny.CLASSES)).astype(np.float32),
        "weight": random.choice([0.5, 1.0, 2.0], shape).astype(np.float32),
    }


def padded(batch, rows):
    """More examples of weight 0, with inputs like others, but labels and soft targets that are wrong."""
    fill = {"label": 7, "teacher_logits": np.nan, "weight": 0.0, "inputs": 255}
    return {
        name: np.concatenate([x, np.full((rows, *x.shape[1:]), fill[name], x.dtype)])
        for name, x in batch.items()
    }


@functools.cache
def state_of(model):
    sample = batch_of(model)["inputs"][:1]
    return train_step.init_state(model, OPTIMIZER, jax.random.key(0), sample)


def update(model, batch, key, *, fused=False, mesh=None, **options):
    """The new parameters and the metrics of one step."""
    loss = step_losses.distillation_loss
    mesh = (
        Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES) if mesh is None else mesh
    )
    if fused:
        loss = train_step.Fused(loss, rows=3, over=sharding.over_data(mesh))
    step = train_step.make_train_step(model, OPTIMIZER, loss, **options)
    compiled = sharding.compile_step(step, mesh, state_of(model))
    state, metrics = compiled(tiny.copy(state_of(model)), batch, key, tiny.hyper(), None)
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model", [FLAT, FRAMES], ids=["examples", "sequences"])
def test_padding_changes_no_number(model, fused, key):
    batch = batch_of(model)
    expected = update(model, batch, key, fused=fused)
    for rows in (1, 8, 24):
        tiny.assert_close(update(model, padded(batch, rows), key, fused=fused), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_nor_on_a_mesh_nor_in_micro_batches(fused, key):
    batch = batch_of(FLAT)
    expected = update(FLAT, batch, key)
    for mesh in (sharding.make_mesh(), sharding.make_mesh(1, 4, 2)):
        tiny.assert_close(update(FLAT, padded(batch, 24), key, mesh=mesh, fused=fused), expected)
    whole = padded(batch, 8)
    tiny.assert_close(update(FLAT, whole, key, micro_batches=4, fused=fused), expected)


def test_padding_under_pmap(key):
    batch = padded(batch_of(FLAT), 8)
    expected = update(FLAT, batch, key)
    step = train_step.make_train_step(
        FLAT, OPTIMIZER, step_losses.distillation_loss, axis_name="data"
    )
    run = sharding.compile_pmap_step(step)
    state, metrics = run(state_of(FLAT), batch, key, tiny.hyper(), None)
    tiny.assert_close((state.params, metrics), expected)


@pytest.mark.parametrize("model", [FLAT, FRAMES], ids=["examples", "sequences"])
def test_a_weight_is_so_many_examples(model, key):
    batch = batch_of(model)
    batch["weight"] = np.float32(np.arange(B) % 3)  # of whole sequences too
    times = np.repeat(np.arange(B), np.arange(B) % 3)
    repeated = {name: x[times] for name, x in batch.items() if name != "weight"}
    tiny.assert_close(update(model, batch, key), update(model, repeated, key))


def test_mean_and_gradient_are_those_of_float64(key):
    linear = models.mlp([], tiny.CLASSES)
    batch = {**batch_of(FLAT), "label": np.arange(B, dtype=np.int32) % 3}
    state = train_step.init_state(linear, OPTIMIZER, key, batch["inputs"][:1])
    step = jax.jit(train_step.make_train_step(linear, OPTIMIZER, step_losses.label_loss))
    after, metrics = step(state, batch, key, tiny.hyper(learning_rate=0.2))
    kernel = np.float64(state.params["output"]["kernel"])
    x = np.float64(batch["inputs"]).reshape(B, -1) / 255
    z, w, onehot = x @ kernel, np.float64(batch["weight"]), np.eye(3)[batch["label"]]
    log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
    losses = -(onehot * log_q).sum(-1)
    np.testing.assert_allclose(metrics["loss"], (w * losses).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["examples"], w.sum(), rtol=1e-6)
    np.testing.assert_allclose(
        metrics["errors"], (w * (z.argmax(-1) != batch["label"])).sum(), rtol=1e-6
    )
    gradient = x.T @ ((np.exp(log_q) - onehot) * (w / w.sum())[:, None])
    expected = kernel - 0.2 * 1.9 * gradient
    np.testing.assert_allclose(after.params["output"]["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_a_batch_of_padding_alone_and_a_negative_weight(key):
    batch = {**batch_of(FLAT), "weight": np.zeros(B, np.float32)}
    params, metrics = update(FLAT, batch, key)
    tiny.assert_equal(params, jax.device_get(state_of(FLAT).params))
    assert metrics["loss"] == 0 and metrics["examples"] == 0
    batch["weight"][2] = -1
    assert np.isnan(update(FLAT, batch, key)[1]["loss"])


def test_evaluation_counts_weights():
    batch = padded(batch_of(FLAT), 5)
    evaluate = train_step.make_eval_step(FLAT)
    found = evaluate(state_of(FLAT).params, batch)
    tiny.assert_close(found, evaluate(state_of(FLAT).params, batch_of(FLAT)))
    assert found["count"] == batch["weight"][batch["label"] >= 0].sum()


def test_a_training_with_padding(tmp_path, key):
    recipe = trainer.Recipe(epochs=2, batch_size=4, optimizer=lambda steps, epochs: OPTIMIZER)
    examples = tiny.examples(12) | {"weight": np.float32([1] * 9 + [0] * 3)}
    examples["label"][9:] = 99

    def train(folder, **changes):
        return trainer.train(
            tmp_path / folder,
            FLAT,
            examples | changes,
            step_losses.label_loss,
            recipe,
            keys=key[None],
            hyper={"learning_rate": 0.01},
            evaluation={"test_errors": examples},
            mesh=Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES),
        )

    record = train("padded").history[-1]
    assert 0 < record["train_loss"][0] < 3 and 0 <= record["test_errors"][0] <= 9
    negative = np.where(np.arange(12) == 4, np.float32(-1), np.float32(1))
    with pytest.raises(UserError, match=r"weight -1.0 at row 4; allowed: 0 or more"):
        train("negative", weight=negative, label=np.zeros(12, np.int32))
    with pytest.raises(UserError, match="all 12 weights are 0"):
        train("none", weight=np.zeros(12, np.float32))


def test_weights_that_do_not_fit(key):
    with pytest.raises(UserError, match=r"weight is \[8, 3\], but there are values \[8\]"):
        update(FLAT, {**batch_of(FLAT), "weight": np.ones((B, T), np.float32)}, key)
    assert batches.weights({"weight": jnp.ones(2, bool)}).dtype == jnp.float32
