"""Trained nets in folders: written whole, checked when read, used without training code."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command import ENVIRONMENT, ROOT

from distill_jax import losses, models, nets
from distill_jax.errors import UserError

MODEL = models.chain(
    models.conv_trunk((4,), (2,)), models.mlp([5], tiny.CLASSES, hidden_dropout=0.5)
)
INPUTS = tiny.examples(7)["inputs"]
HISTORY = [{"unit": 1, "epoch": 2, "step": [3, 3], "train_loss": [0.5, 0.25]}]


def make_net(model=MODEL, dtype=jnp.float32, **about):
    keys = jax.random.split(jax.random.key(0), 2)
    params = jax.vmap(lambda key: model.init(key, INPUTS))(keys)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    fields = {"inputs": {"shape": [4, 4], "dtype": "uint8"}, "config": {"hidden": [5]}, **about}
    return nets.Net(model, params, HISTORY, 1.5, 2, fields)


@pytest.fixture
def folder(tmp_path):
    nets.save(tmp_path / "net", make_net())
    return tmp_path / "net"


def test_round_trip(folder):
    net, read = make_net(), nets.load(folder)
    tiny.assert_equal(read.params, jax.tree.map(np.asarray, net.params))
    assert read.model is MODEL  # the same object, so that it is compiled once
    assert read[2:5] == net[2:5] and read.about == net.about
    assert read.fingerprint == net.fingerprint == nets.read_meta(folder)["fingerprint"]
    expected = np.stack([MODEL.apply(net.member(m).params, INPUTS) for m in range(2)])
    np.testing.assert_allclose(read.logits(INPUTS), expected, rtol=1e-5, atol=1e-6)


def test_one_member(folder):
    net = nets.load_net(folder, member=1)
    assert net.members is None
    assert net.history == [{"unit": 1, "epoch": 2, "step": 3, "train_loss": 0.25}]
    logits = net.logits(INPUTS)
    np.testing.assert_array_equal(logits, nets.load(folder).logits(INPUTS)[1])
    np.testing.assert_array_equal(
        net.probabilities(INPUTS, 3.0), losses.softmax(jnp.asarray(logits), 3.0)
    )
    with pytest.raises(UserError, match=r"no member 2; the folder holds 2, numbered from 0"):
        nets.load_net(folder, member=2)


def test_in_a_fresh_process_without_training_code(folder):
    code = (
        "import sys, numpy, distill_jax; "
        f"net = distill_jax.load_net({str(folder)!r}); "
        "print(net.logits(numpy.zeros((1, 4, 4), numpy.uint8)).shape, "
        "'distill_jax.trainer' in sys.modules)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True
    )
    assert done.stdout == "(1, 3) False\n", done.stderr


def test_one_net_is_saved_as_the_only_member(tmp_path):
    one = make_net().member(0)
    nets.save(tmp_path, one)
    read = nets.load_net(tmp_path)
    tiny.assert_equal(read.params, jax.tree.map(np.asarray, one.params))
    assert read.history == one.history


def test_bfloat16_parameters(tmp_path):
    net = make_net(dtype=jnp.bfloat16)
    nets.save(tmp_path, net)
    read = nets.load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(read.params)} == {jnp.dtype(jnp.bfloat16)}
    tiny.assert_equal(read.params, jax.tree.map(np.asarray, net.params))


def test_stack_and_some():
    net = make_net()
    both = nets.stack([net, net])
    assert both.members == 4 and both.seconds == 3.0
    assert both.history == [{"step": [3] * 4, "train_loss": [0.5, 0.25] * 2}]
    tiny.assert_equal(
        both.some(1, 2).member(0).params, jax.tree.map(np.asarray, net.member(1).params)
    )


def test_other_files_of_the_folder_stay(folder):
    (folder / "notes.txt").write_text("mine")
    nets.save(folder, make_net())
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == ["net.json", "notes.txt"] and len(names) == 3
    other = make_net()
    other = other._replace(params=jax.tree.map(jnp.zeros_like, other.params))
    with pytest.raises(UserError, match=r"holds another net: fingerprint is .* overwrite=True"):
        nets.save(folder, other)
    tiny.assert_equal(nets.load(folder).params, make_net().params)
    nets.save(folder, other, overwrite=True)
    tiny.assert_equal(nets.load(folder).params, other.params)
    assert len(list(folder.iterdir())) == 3
    (folder / "net.json").write_text('{"pages": 3}')
    with pytest.raises(UserError, match="has format None version None"):
        nets.save(folder, other, overwrite=True)
    assert (folder / "net.json").read_text() == '{"pages": 3}'


def test_parameters_of_every_dtype(tmp_path):
    dtypes = ("bool", "int4", "uint8", "float8_e4m3fn", "bfloat16", "complex64")
    params = {name: jnp.asarray(np.arange(6).reshape(2, 3) % 2, name) for name in dtypes}
    params |= {"empty": np.zeros((2, 0)), "scalar": np.ones(2)}
    model = models.Model(MODEL.init, MODEL.apply)
    nets.save(tmp_path, nets.Net(model, params, [], 0.0, 2, {}))
    read = nets.load(tmp_path, model).params
    for name, leaf in params.items():
        assert read[name].dtype == leaf.dtype
        np.testing.assert_array_equal(read[name], leaf)
    with pytest.raises(UserError, match="parameters key are random keys"):
        nets.save_params(tmp_path / "p.npz", {"key": jax.random.key(0)})


def test_bad_folders(folder, tmp_path):
    with pytest.raises(UserError, match=r"none/net.json can't be read.*finished training"):
        nets.load(tmp_path / "none")
    data = bytearray((folder / "params.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "params.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"params.npz is damaged"):
        nets.load(folder)
    (folder / "params.npz").unlink()
    with pytest.raises(UserError, match=r"params.npz is damaged"):
        nets.load(folder)
    meta = json.loads((folder / "net.json").read_text())
    (folder / "net.json").write_text(json.dumps({**meta, "seconds": 2.5}))
    with pytest.raises(UserError, match=r"net.json is damaged: its SHA-256"):
        nets.load(folder)
    (folder / "net.json").write_text(json.dumps({**meta, "version": 2}))
    with pytest.raises(
        UserError, match=r"version 2; this program reads distill_jax\.net version 1"
    ):
        nets.load(folder)
    (folder / "net.json").write_text("{")
    with pytest.raises(UserError, match=r"net.json is damaged"):
        nets.load(folder)


def test_a_model_of_ones_own_must_be_handed_in(tmp_path):
    own = models.Model(MODEL.init, MODEL.apply)
    nets.save(tmp_path, make_net(own))
    with pytest.raises(UserError, match=r"a model of your own.*load_net\(folder, model="):
        nets.load_net(tmp_path)
    assert nets.load_net(tmp_path, model=own).logits(INPUTS).shape == (7, tiny.CLASSES)
    other = models.mlp([6], tiny.CLASSES)
    with pytest.raises(
        UserError, match=r"not fit the model: hidden_0/bias is \[5\] there and \[6\]"
    ):
        nets.load_net(tmp_path, model=other)


def test_activations_without_a_name_have_no_description(tmp_path):
    net = models.mlp([5], tiny.CLASSES, activation=jnp.tanh)
    assert (
        net.description == "" and models.chain(models.conv_trunk((4,), (2,)), net).description == ""
    )


def test_a_description_that_is_not_known():
    changed = json.loads(models.mlp([5], 3).description)
    for field, value in (("kind", "transformer"), ("activation", "swish")):
        with pytest.raises(UserError, match=f"no model of kind .*{value}"):
            models.build(json.dumps({**changed, field: value}))


def test_inputs_of_another_shape(folder):
    with pytest.raises(UserError, match=r"inputs are \[5, 5\] each, but .* on \[4, 4\] each"):
        nets.load_net(folder).logits(np.zeros((2, 5, 5), np.uint8))


def test_names_may_have_slashes(tmp_path):
    params = {"norm": {"Dense_0/kernel/u": np.ones(2)}, "100%2F": np.zeros(1)}
    dtypes = nets.save_params(tmp_path / "p.npz", params)
    assert sorted(dtypes) == ["100%252F", "norm/Dense_0%2Fkernel%2Fu"]
    tiny.assert_equal(nets.load_params(tmp_path / "p.npz", dtypes), params)


def test_parameters_must_be_nested_dicts(tmp_path):
    with pytest.raises(UserError, match=r"leaf at params\['a'\]\[0\]"):
        nets.save_params(tmp_path / "p.npz", {"a": [np.zeros(2)]})
