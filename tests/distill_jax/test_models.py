"""Networks: their sizes, modes, dropout and dtypes; convolutions against those of XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax import models, platforms
from distill_jax.errors import UserError


def build(key, **kwargs):
    model = models.mlp([6, 5], tiny.CLASSES, **kwargs)
    images = jnp.asarray(tiny.examples(8)["inputs"])
    return model, model.init(key, images), images


def test_parameter_count_of_the_paper(key):
    model = models.mlp([1200, 1200], 10)
    shapes = jax.eval_shape(model.init, key, jnp.zeros((1, 28, 28), jnp.uint8))
    assert models.parameter_count(shapes) == 2_395_210


def test_logits_are_those_of_numpy(key):
    model, params, images = build(key)
    x = np.asarray(images, np.float64).reshape(8, -1) / 255
    for name in ("hidden_0", "hidden_1"):
        layer = jax.tree.map(np.float64, params[name])
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    output = jax.tree.map(np.float64, params["output"])
    expected = x @ output["kernel"] + output["bias"]
    np.testing.assert_allclose(model.apply(params, images), expected, rtol=1e-5, atol=1e-6)


def test_uint8_inputs_are_scaled(key):
    model, params, images = build(key)
    scaled = model.apply(params, images.astype(jnp.float32) / 255)
    np.testing.assert_allclose(model.apply(params, images), scaled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, bool])
def test_inputs_that_would_be_read_unscaled(key, dtype):
    for model in (models.mlp([2], tiny.CLASSES), models.conv_trunk([2], [2])):
        with pytest.raises(UserError, match=rf"inputs are {np.dtype(dtype)}; expected uint8"):
            jax.eval_shape(model.init, key, np.zeros((2, 4, 4), dtype))


def test_nothing_is_dropped_without_a_key(key):
    model, params, images = build(key, input_dropout=0.5, hidden_dropout=0.5)
    plain, _, _ = build(key)
    np.testing.assert_array_equal(model.apply(params, images), plain.apply(params, images))


def test_dropout_is_a_function_of_its_key(key):
    model, params, images = build(key, input_dropout=0.2, hidden_dropout=0.5)
    first, again = (model.apply(params, images, dropout_key=key) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = model.apply(params, images, dropout_key=jax.random.key(1))
    assert not np.allclose(first, other)
    assert not np.allclose(first, model.apply(params, images))


def test_layers_draw_their_own_masks(key):
    ones = jnp.ones((4, 256))
    model = models.mlp([256, 256], 2, hidden_dropout=0.5)
    params = jax.tree.map(jnp.zeros_like, model.init(key, ones))
    params["hidden_0"]["bias"] += 1.0
    params["hidden_1"]["kernel"] += jnp.eye(256)
    params["output"]["kernel"] += 1.0
    kept = model.apply(params, ones, dropout_key=key)[:, 0] / 4  # units that both layers keep
    # Binomial: 64 of 256 kept, with a standard deviation of 7; equal masks would keep 128.
    assert (np.abs(kept - 64) < 35).all()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_its_rate_and_the_mean(key, rate):
    size = 200_000
    out = np.asarray(models.dropout(key, jnp.ones(size), rate), np.float64)
    kept = out > 0
    deviation = np.sqrt(rate * (1 - rate) / size)
    # Five standard deviations, and the rounding of the rate to 1/256.
    assert abs(kept.mean() - (1 - rate)) <= 5 * deviation + 1 / 512
    assert abs(out.mean() - 1) <= 5 * deviation / (1 - rate) + 1e-5
    assert len(np.unique(out[kept])) == 1


def test_bfloat16_arithmetic_has_float32_parameters_and_logits(key):
    model, params, images = build(key, dtype=jnp.bfloat16, hidden_dropout=0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact, _, _ = build(key)
    found = model.apply(params, images)
    assert found.dtype == jnp.float32
    assert model.apply(params, images, dropout_key=key).dtype == jnp.float32
    # bfloat16 has 8 bits: three layers of it are good to about one part in 50.
    expected = exact.apply(params, images)
    np.testing.assert_allclose(found, expected, atol=0.02 * float(jnp.abs(expected).max()))
    assert np.any(found != expected)


def test_the_first_weights_of_a_key_stay_what_they_were(key):
    """Numbers of the first release: published results start from these weights."""
    _, params, _ = build(key)
    first = {name: np.asarray(layer["kernel"]).ravel()[:3] for name, layer in params.items()}
    expected = {
        "hidden_0": [-0.43867138, 0.35617539, -0.50978011],
        "hidden_1": [0.12771299, -0.81780112, 0.89853513],
        "output": [-0.53099442, -0.15971841, -0.06891217],
    }
    tiny.assert_close(first, {name: np.array(row) for name, row in expected.items()}, rtol=1e-6)
    assert not any(layer["bias"].any() for layer in params.values())


def test_activation_of_the_hidden_layers_alone(key):
    model, params, images = build(key, activation=jax.nn.gelu)
    x = np.asarray(images, np.float64).reshape(8, -1) / 255
    for name in ("hidden_0", "hidden_1"):
        x = x @ np.float64(params[name]["kernel"])
        x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    expected = x @ np.float64(params["output"]["kernel"])
    np.testing.assert_allclose(model.apply(params, images), expected, rtol=1e-5, atol=1e-6)


def test_output_scale_is_on_the_first_output_weights_alone(key):
    ones = jnp.ones((1, 400))
    plain, small = (models.mlp([500], 40, output_scale=s).init(key, ones) for s in (1.0, 0.15))
    tiny.assert_equal(small["hidden_0"], plain["hidden_0"])
    tiny.assert_close(small["output"]["kernel"], 0.15 * plain["output"]["kernel"])
    # LeCun-normal: 1 / sqrt(500); five standard errors of the deviation of 20,000 numbers.
    deviation = float(np.std(small["output"]["kernel"])) * np.sqrt(500)
    assert abs(deviation - 0.15) < 0.15 * 5 / np.sqrt(2 * 20_000)


def test_hidden_scale_is_on_the_first_hidden_weights_alone(key):
    ones = jnp.ones((1, 400))
    plain, small = (models.mlp([50, 30], 4, hidden_scale=s).init(key, ones) for s in (1.0, 0.3))
    tiny.assert_equal(small["output"], plain["output"])
    for layer in ("hidden_0", "hidden_1"):
        tiny.assert_close(small[layer]["kernel"], 0.3 * plain[layer]["kernel"])
    described = models.build(models.mlp([50, 30], 4, hidden_scale=0.3).description)
    tiny.assert_equal(described.init(key, ones), small)
    assert "hidden_scale" not in models.mlp([50], 4).description  # as in nets of before
    with pytest.raises(UserError, match="hidden_scale is 0"):
        models.mlp([50], 4, hidden_scale=0)


def pictures(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def random_params(model, images, seed=3):
    """Weights and biases of about a trained layer's size, without the compilation of an init."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            random.standard_normal(leaf.shape) / leaf.shape[0] ** 0.5, "float32"
        ),
        jax.eval_shape(model.init, jax.random.key(0), images),
    )


def convolve(params, x, strides, activation):
    """The trunk by XLA's own convolution of `x` `[B, H, W, c]`."""
    for i, s in enumerate(strides):
        kernel, bias = params[f"conv_{i}"]["kernel"], params[f"conv_{i}"]["bias"]
        # A row of it is (block row, block column, row in it, column in it, colour) of the window.
        kernel = kernel.reshape(2, 2, s, s, x.shape[-1], -1).transpose(0, 2, 1, 3, 4, 5)
        x = jax.lax.conv_general_dilated(
            x,
            kernel.reshape(2 * s, 2 * s, x.shape[-1], -1),
            window_strides=(s, s),
            padding=((s // 2, s // 2), (s // 2, s // 2)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        x = activation(x + bias[None, None, None])
    return x.reshape(len(x), -1)


@pytest.mark.parametrize(
    ("shape", "activation"),
    [((5, 16, 24), jax.nn.gelu), ((5, 8, 16, 3), jax.nn.relu)],
    ids=["grey, gelu", "colour, relu"],
)
@pytest.mark.parametrize("strides", [(2,), (4,), (2, 4), (4, 2)], ids=str)
def test_trunk_is_a_stack_of_convolutions(strides, shape, activation):
    channels, images = (6, 7)[: len(strides)], pictures(shape)
    model = models.conv_trunk(channels, strides, activation=activation)
    params = random_params(model, images)
    places = shape[1] * shape[2] // np.prod(strides) ** 2
    x = images.astype(jnp.float32).reshape(*shape[:3], -1) / 255
    found = model.apply(params, images)
    assert found.shape == (5, places * channels[-1]) and found.dtype == jnp.float32
    expected = convolve(params, x, strides, activation)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("colours", [1, 3])
def test_trunk_starts_as_kernels_of_twice_the_stride_he_normal(key, colours):
    model = models.conv_trunk((64, 256), (4, 2))
    params = jax.jit(model.init)(key, pictures((1, 16, 16, colours)))
    sizes = {"conv_0": (8 * 8 * colours, 64), "conv_1": (4 * 4 * 64, 256)}
    assert {name: layer["kernel"].shape for name, layer in params.items()} == sizes
    for name, (fan_in, units) in sizes.items():
        variance = float(np.var(params[name]["kernel"])) * fan_in / 2
        assert abs(variance - 1) < 5 * np.sqrt(2 / (fan_in * units))
        assert not params[name]["bias"].any()


@pytest.mark.parametrize("byte", [(0.0, 255.0), (40.0, 64.0)])
def test_trunk_scales_bytes_before_it_pads(byte):
    model, images = models.conv_trunk((6,), (4,), scaling=byte), pictures((3, 8, 8))
    params = random_params(model, images)
    scaled = (images.astype(jnp.float32) - byte[0]) / byte[1]
    expected = convolve(params, scaled[..., None], (4,), jax.nn.gelu)
    np.testing.assert_allclose(model.apply(params, images), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.apply(params, scaled), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "strides"),
    [((8, 4), (2,)), ((8,), (2, 2)), ((8, 4), (3, 2)), ((8,), (1,)), ((8,), (0,)), ((8,), (-2,))],
)
def test_strides_that_make_no_trunk_are_named(channels, strides):
    with pytest.raises(UserError) as error:
        models.conv_trunk(channels, strides)
    assert str(error.value) == (
        f"channels {channels} need as many strides, all even and above 0, not {strides}"
    )


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 10, 16), "images of 10 x 16 at a layer of stride 4"),
        ((1, 16, 10, 3), "images of 16 x 10 at a layer of stride 4"),
        ((1, 12, 16), "images of 3 x 4 at a layer of stride 2"),
    ],
)
def test_sides_that_strides_do_not_divide_are_named(key, shape, expected):
    with pytest.raises(UserError, match=f"^{expected}, which must divide both: choose other"):
        models.conv_trunk((8, 4), (4, 2)).init(key, pictures(shape))


def build_chain(dtype=jnp.float32, **kwargs):
    trunk = models.conv_trunk((6, 7), (4, 2), dtype=dtype)
    head = models.mlp([9], tiny.CLASSES, dtype=dtype, **kwargs)
    model, images = models.chain(trunk, head), pictures((5, 16, 16))
    return trunk, head, model, random_params(model, images), images


def test_chain_is_the_head_of_the_trunks_features():
    trunk, head, model, params, images = build_chain()
    assert sorted(params) == ["conv_0", "conv_1", "hidden_0", "output"]
    of_head = models.head_params(params)
    assert sorted(of_head) == ["hidden_0", "output"]
    assert all(of_head[name] is params[name] for name in of_head)
    features = trunk.apply({name: params[name] for name in ("conv_0", "conv_1")}, images)
    assert of_head["hidden_0"]["kernel"].shape[0] == features.shape[1] == 2 * 2 * 7
    np.testing.assert_array_equal(model.apply(params, images), head.apply(of_head, features))


def test_chain_trains_its_trunk_through_its_head():
    _, _, model, params, images = build_chain()

    @jax.jit
    def loss(params):
        return jnp.sum(model.apply(params, images) ** 2)

    gradient = jax.grad(loss)(params)
    for name in params:  # each layer's own gradient is the slope along it
        for part, direction in jax.tree.map(np.asarray, gradient[name]).items():
            length = np.linalg.norm(direction)
            assert length > 0
            up, down = (
                {**params, name: {**params[name], part: params[name][part] + step * direction}}
                for step in (1e-3 / length, -1e-3 / length)
            )
            np.testing.assert_allclose((loss(up) - loss(down)) / 2e-3, length, rtol=0.01)


def test_chain_drops_in_its_head_by_the_key(key):
    trunk, head, model, params, images = build_chain(hidden_dropout=0.5)
    dropped = model.apply(params, images, dropout_key=key)
    features = trunk.apply(params, images)
    np.testing.assert_array_equal(dropped, head.apply(params, features, dropout_key=key))
    assert not np.allclose(dropped, model.apply(params, images))
    assert not np.allclose(dropped, model.apply(params, images, dropout_key=jax.random.key(1)))
    np.testing.assert_array_equal(trunk.apply(params, images, dropout_key=key), features)


def test_chain_in_bfloat16():
    trunk, _, model, params, images = build_chain(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert trunk.apply(params, images).dtype == jnp.bfloat16
    found, expected = model.apply(params, images), build_chain()[2].apply(params, images)
    assert found.dtype == jnp.float32
    # Four layers of 8 bits, as above.
    np.testing.assert_allclose(found, expected, atol=0.02 * float(jnp.abs(expected).max()))
    assert np.any(found != expected)


def test_a_vmapped_chain_is_each_alone(key):
    _, _, model, _, images = build_chain(hidden_dropout=0.5)
    members = [random_params(model, images, seed) for seed in range(3)]
    keys = jax.random.split(key, 3)

    def run(params, key):
        dropped = jax.grad(lambda p: jnp.sum(model.apply(p, images, dropout_key=key) ** 2))
        return model.apply(params, images), dropped(params)

    alone, stacked = jax.jit(run), jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together = jax.jit(jax.vmap(run))(stacked, keys)
    for m, params in enumerate(members):
        found = jax.tree.map(lambda leaf, m=m: leaf[m], together)
        tiny.assert_close(found, alone(params, keys[m]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_convolution_of_tpus_gives_what_patches_give(key, stride, dtype):
    trunk = models.conv_trunk((3, 5), (2, stride), dtype=dtype)
    images = jax.random.randint(key, (2, 16, 24, 2), 0, 256, jnp.int32).astype(jnp.uint8)
    params = jax.jit(trunk.init)(key, images)

    def features(params):
        found = trunk.apply(params, images)
        return jnp.sum(jnp.square(found.astype(jnp.float32))), found

    expected = jax.jit(jax.grad(features, has_aux=True))(params)
    with platforms.compiling_for("tpu"):
        assert "conv_general_dilated" in str(jax.make_jaxpr(trunk.apply)(params, images))
        shapes = jax.eval_shape(trunk.init, key, images)
        tiny.assert_equal(jax.tree.map(jnp.shape, shapes), jax.tree.map(jnp.shape, params))
        found = jax.jit(jax.grad(features, has_aux=True))(params)
        with pytest.raises(UserError, match="images of 15 x 24 at a layer of stride 2"):
            trunk.apply(params, images[:, 1:])
    share = 3e-2 if dtype == jnp.bfloat16 else 1e-5
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=share * np.abs(other).max())
