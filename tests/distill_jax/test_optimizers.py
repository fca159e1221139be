"""The optimizers against optax, and against the published recipe in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

from distill_jax import layers, optimizers
from distill_jax.errors import UserError

# optax's own arithmetic in adam and in the cosine promotes dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

CONSTANT = optax.constant_schedule(1.0)


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def make_params(seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    shapes = {"hidden_0": (6, 4), "hidden_1": (4, 5), "output": (5, 3)}
    return {
        name: {
            "kernel": jnp.asarray(scale * random.standard_normal(shape), jnp.float32),
            "bias": jnp.asarray(random.standard_normal(shape[1]), jnp.float32),
        }
        for name, shape in shapes.items()
    }


def run(optimizer, steps, **extra):
    params = make_params()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for seed in range(1, steps + 1):
        updates, state = update(make_params(seed), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (optimizers.sgd, lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True)),
        (optimizers.adam, optax.adam),
    ],
)
def test_optimizers_are_those_of_optax(ours, theirs):
    schedule = optimizers.cosine(10, warmup_steps=2)
    found = run(ours(schedule), 6, learning_rate=jnp.float32(0.1))
    tiny.assert_close(found, run(theirs(lambda step: 0.1 * schedule(step)), 6))


def lengths(layer):
    return np.linalg.norm(np.float64(layer["kernel"]), axis=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda norm: optimizers.sgd(CONSTANT, max_norm=norm),
        lambda norm: optimizers.adam(CONSTANT, max_norm=norm),
        lambda norm: optimizers.dropout_2012(2, max_norm=norm),
    ],
)
def test_max_norm_limits_hidden_units_alone(make):
    free, limited = (run(make(norm), 3, learning_rate=jnp.float32(0.5)) for norm in (0.0, 1.5))
    assert lengths(free["hidden_0"]).max() > 1.5
    for name in ("hidden_0", "hidden_1"):
        assert lengths(limited[name]).max() <= 1.5 * (1 + 1e-6)
        tiny.assert_equal(limited[name]["bias"], free[name]["bias"])
    tiny.assert_equal(limited["output"], free["output"])
    assert lengths(free["output"]).max() > 1.5


def own_net(wrap):
    """Parameters of a net whose softmax layer is called "classifier", as flax gives them."""
    params = make_params()
    named = {"hidden": params["hidden_0"], "classifier": params["output"]}
    return {"dict": lambda p: {"params": p}, "nnx": nnx.State}[wrap](named)


@pytest.mark.parametrize("wrap", ["dict", "nnx"])
def test_the_layer_that_max_norm_leaves_free_is_named(wrap):
    params, rate = own_net(wrap), {"learning_rate": jnp.float32(0.0)}

    def longest(output, layer):
        optimizer = optimizers.sgd(CONSTANT, max_norm=0.1, output=output)
        updates, _ = optimizer.update(params, optimizer.init(params), params, **rate)
        return lengths(layers.find(optax.apply_updates(params, updates), layer)).max()

    free = lengths(layers.find(params, "classifier")).max()
    np.testing.assert_allclose(longest("classifier", "classifier"), free, rtol=1e-6)
    np.testing.assert_allclose(longest("classifier", "hidden"), 0.1, rtol=1e-5)
    for optimizer in (
        optimizers.sgd(CONSTANT, max_norm=1.0),
        optimizers.adam(CONSTANT, max_norm=1.0, output="head"),
        optimizers.dropout_2012(2),
    ):
        with pytest.raises(UserError, match=r"named '(output|head)', only .*classifier"):
            optimizer.init(params)


def test_a_layer_of_a_name_that_occurs_twice_is_not_chosen():
    params = {name: {"output": {"bias": jnp.zeros(2)}} for name in ("a", "b")}
    with pytest.raises(UserError, match=r"2 layers .* named 'output': a/output, b/output"):
        layers.find(params, "output")


@pytest.mark.parametrize("make", [optimizers.sgd, optimizers.adam, optimizers.dropout_2012])
def test_narrow_parameters_train_in_a_scan(make):
    optimizer = make(4 if make is optimizers.dropout_2012 else CONSTANT, max_norm=1.0)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(params, state, params, learning_rate=jnp.float32(0.1))
        return (optax.apply_updates(params, updates), state), None

    (found, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    assert lengths(jax.tree.map(jnp.float32, found["hidden_0"])).max() <= 1.01


def test_max_norm_keeps_directions_and_leaves_short_vectors():
    kernel = jnp.array([[3.0, 0.3, 0.0], [4.0, 0.4, 0.0]])
    update = jnp.array([[3.0, 0.01, 0.0], [4.0, -0.02, 0.0]])
    limit = optimizers.limit_incoming_weights(2.0)
    updates, _ = limit.update({"k": update}, limit.init({"k": kernel}), {"k": kernel})
    moved = optax.apply_updates({"k": kernel}, updates)["k"]
    np.testing.assert_allclose(moved[:, 0], [1.2, 1.6], rtol=1e-6)
    np.testing.assert_array_equal(moved[:, 1:], (kernel + update)[:, 1:])


def dropout_2012_64(params, grads, steps_per_epoch, rate, limit_squared):
    """Appendix A of Hinton et al. 2012, for one layer."""
    w, v = np.float64(params), np.zeros_like(params, np.float64)
    for step, gradient in enumerate(grads):
        epoch = step / steps_per_epoch
        part = min(epoch / 500, 1.0)
        momentum = (1 - part) * 0.5 + part * 0.99
        v = momentum * v - (1 - momentum) * rate * 0.998**epoch * np.float64(gradient)
        w = w + v
        squared = (w**2).sum(0)
        w = w * np.where(squared > limit_squared, np.sqrt(limit_squared / squared), 1.0)
    return w


def test_dropout_2012_is_the_published_recipe():
    # 40 epochs in each step, so that 15 steps pass the end of the momentum's rise.
    found = run(optimizers.dropout_2012(1 / 40), 15, learning_rate=jnp.float32(10.0))
    for name, limit in (("hidden_0", 15.0), ("hidden_1", 15.0), ("output", np.inf)):
        kernel, *grads = (make_params(seed)[name]["kernel"] for seed in range(16))
        expected = dropout_2012_64(kernel, grads, 1 / 40, 10.0, limit)
        # Rounding errors are relative to the largest terms, which cancel.
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found[name]["kernel"], expected, rtol=1e-5, atol=atol)
    np.testing.assert_allclose(lengths(found["hidden_0"]).max() ** 2, 15.0, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [optimizers.sgd(CONSTANT), optimizers.adam(CONSTANT), optimizers.dropout_2012(2)],
)
def test_learning_rates_are_traced(optimizer):
    traces = []

    @jax.jit
    def sweep(rates):
        traces.append(1)
        return jax.vmap(lambda rate: run(optimizer, 2, learning_rate=rate))(rates)

    rates = jnp.array([0.0, 0.01, 0.5])
    found = sweep(rates)
    sweep(2 * rates)
    assert len(traces) == 1
    for i, rate in enumerate(rates):
        alone = run(optimizer, 2, learning_rate=rate)
        tiny.assert_close(jax.tree.map(lambda x, i=i: x[i], found), alone)
    tiny.assert_equal(jax.tree.map(lambda x: x[0], found), make_params())


def test_cosine_endpoints():
    schedule = optimizers.cosine(10)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [1, 0.5, 0], atol=1e-7)
    schedule = optimizers.cosine(10, warmup_steps=4)
    values = [schedule(step) for step in (0, 2, 4, 7, 10, 12)]
    np.testing.assert_allclose(values, [0, 0.5, 1, 0.5, 0, 0], atol=1e-7)
