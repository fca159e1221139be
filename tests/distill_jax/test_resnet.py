"""Residual networks: against convolutions of NumPy, trained step by step on a CPU, read without code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax import load_net, models, optimizers, program, step_losses, trainer
from distill_jax.errors import UserError

MODEL = models.resnet(8, tiny.CLASSES, width=2)
RANDOM = np.random.default_rng(0)


@functools.cache
def variables(images=(1, 5, 6)):
    """Random numbers, so that no layer is without effect; variances above 0."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros(images, jnp.uint8))
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(RANDOM.uniform(0.2, 1.0, leaf.shape), jnp.float32)
            * RANDOM.choice([-1.0, 1.0], leaf.shape).astype(np.float32) ** (len(leaf.shape) > 1)
        ),
        shapes,
    )


def conv(x, kernel, stride=1):
    rows, columns = x.shape[1:3]
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [
        x[:, i : i + rows : stride, j : j + columns : stride] @ np.float64(kernel[i, j])
        for i in range(3)
        for j in range(3)
    ]
    return sum(windows)


def norm(x, params, state):
    scale = np.float64(params["scale"]) / np.sqrt(np.float64(state["var"]) + 1e-5)
    return (x - np.float64(state["mean"])) * scale + np.float64(params["bias"])


def test_logits_are_those_of_numpy():
    """Grey images of odd sides, in evaluation mode; the stages' activations, and their means."""
    params, state = variables()
    stats, images = state["batch_stats"], RANDOM.integers(0, 256, (3, 5, 6), np.uint8)
    x = conv(images[..., None] / 255, params["first_conv"]["kernel"])
    x = np.maximum(norm(x, params["first_norm"], stats["first_norm"]), 0)
    expected = {}
    for i, name in enumerate(["block_0_0", "block_1_0", "block_2_0"]):
        own, seen, stride = params[name], stats[name], 2 if i else 1
        y = norm(conv(x, own["conv_0"]["kernel"], stride), own["norm_0"], seen["norm_0"])
        y = norm(conv(np.maximum(y, 0), own["conv_1"]["kernel"]), own["norm_1"], seen["norm_1"])
        x = x[:, ::stride, ::stride]
        x = np.maximum(y + np.pad(x, ((0, 0),) * 3 + ((0, y.shape[-1] - x.shape[-1]),)), 0)
        expected[name] = x
    assert x.shape == (3, 2, 2, 8)
    output = params["output"]
    logits = x.mean((1, 2)) @ np.float64(output["kernel"]) + np.float64(output["bias"])
    found, named = jax.jit(MODEL.activations)(variables(), images)
    np.testing.assert_allclose(found, logits, rtol=1e-4)
    assert list(named) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(named[name], array, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(MODEL.hidden(variables(), images), x.mean((1, 2)), rtol=1e-4)


@pytest.mark.parametrize("depth", [2, 9, 20.0])
def test_depths_that_there_are_not(depth):
    with pytest.raises(UserError, match=rf"depth is {depth}; allowed: 6n \+ 2 for a whole number"):
        models.resnet(depth, 10)


def test_bfloat16_keeps_its_state_in_float32(key):
    narrow = models.resnet(8, tiny.CLASSES, width=2, dtype=jnp.bfloat16)
    images = jnp.zeros((2, 4, 4, 3))
    with jax.numpy_dtype_promotion("standard"):  # Flax's BatchNorm promotes
        shapes = jax.eval_shape(narrow.init, key, images)
        logits, state = jax.eval_shape(narrow.train, shapes, images, key)
    assert {leaf.dtype for leaf in jax.tree.leaves((shapes, logits, state))} == {
        jnp.dtype("float32")
    }


def test_gradients_of_bfloat16_arithmetic_are_float32_and_those_of_it():
    images = jnp.asarray(RANDOM.integers(0, 256, (64, 5, 6), np.uint8))
    start = MODEL.init(jax.random.key(0), images)

    def gradients(**dtypes):
        model = models.resnet(8, tiny.CLASSES, width=2, dtype=jnp.bfloat16, **dtypes)

        def loss(params):
            variables = models.join(params, start.state)
            logits, _ = models.run(model, variables, images, jax.random.key(1), "apply")
            return jnp.mean(jnp.square(logits))

        with jax.numpy_dtype_promotion("standard"):  # Flax's BatchNorm promotes
            return jax.grad(loss)(start.params)

    rounded = gradients(gradient_dtype=jnp.bfloat16)
    found = gradients()
    assert jax.tree.structure(found) == jax.tree.structure(rounded)
    for path, leaf in jax.tree.leaves_with_path(found):
        if path[-1].key == "kernel":
            own = np.asarray(leaf.astype(jnp.bfloat16).astype(jnp.float32))
            assert (np.asarray(leaf) != own).any(), path
    tiny.assert_close(found, rounded, rtol=0.05, atol=0.02)


def test_training_step_by_step_is_the_same(tmp_path, monkeypatch):
    """One member after the other, each step a program, or vmapped and scanned."""
    examples = tiny.examples(16)
    recipe = trainer.Recipe(
        epochs=2,
        batch_size=8,
        report_every=2,
        optimizer=lambda steps, epochs: optimizers.sgd(lambda step: 1.0),
    )
    more = {"keys": jax.random.split(jax.random.key(0), 2), "hyper": {"learning_rate": 0.01}}
    assert program.is_slow_in_loops(MODEL, jnp.zeros((1, 4, 4), jnp.uint8))
    assert not program.is_slow_in_loops(models.mlp([], 3), jnp.zeros((1, 4, 4), jnp.uint8))
    nets = []
    for slow in (True, False):
        monkeypatch.setattr(program, "is_slow_in_loops", lambda *_, slow=slow: slow)
        folder = tmp_path / str(slow)
        nets.append(trainer.train(folder, MODEL, examples, step_losses.label_loss, recipe, **more))
    tiny.assert_close(nets[0].params, nets[1].params, rtol=1e-4, atol=1e-5)
    losses = [net.history[-1]["train_loss"] for net in nets]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    read = load_net(tmp_path / "True")
    assert read.model is MODEL
    np.testing.assert_array_equal(
        read.logits(examples["inputs"]), nets[0].member(0).logits(examples["inputs"])
    )
