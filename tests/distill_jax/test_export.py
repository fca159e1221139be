"""Exports: run by programs without this package, and the same numbers; and what can't be exported."""

import errno
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command import ROOT

from distill_jax import export, files, models, nets
from distill_jax.errors import UserError
from distill_jax.specialists import heads, inference, store

IMAGES = tiny.examples(9, side=8)["inputs"]


def net_of(model, inputs=IMAGES, seed=0):
    params = jax.device_get(model.init(jax.random.key(seed), inputs[:1]))
    about = {"inputs": nets.describe_inputs(inputs), "num_classes": tiny.CLASSES}
    return nets.Net(model, params, [{"train_loss": 0.5}], 1.0, None, about)


MLP = models.mlp([8], tiny.CLASSES)
CHAIN = models.chain(models.conv_trunk([4], [2]), models.mlp([8], tiny.CLASSES))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "net"
    net, shift, names = net_of(CHAIN), [0.0, 2.5, 0.0], ["a", "b", "c"]
    written = export.write(folder, net, IMAGES, int8=True, shift=shift, class_names=names)
    return folder, net, shift, written


def test_a_residual_network_leaves_in_silence(tmp_path, capsys):
    net = net_of(models.resnet(8, tiny.CLASSES, width=2))
    (file,) = export.write(tmp_path / "net", net, IMAGES, formats=["onnx"])
    assert file.difference < 1e-5 and capsys.readouterr() == ("", "")


def test_all_formats_give_the_logits_of_the_net(exported):
    folder, net, _, written = exported
    names = ["net.stablehlo", "net.onnx", "net.safetensors"]
    assert [file.name for file in written] == [*names, "net.int8.stablehlo", "net.int8.safetensors"]
    largest = max(1.0, np.abs(net.logits(IMAGES)).max() + 2.5)
    for file in written[:3]:
        assert file.difference <= 1e-5 * largest and file.changed == 0
    for small, large in zip(written[3:], (written[0], written[2]), strict=True):
        assert small.size < large.size and 0 < small.difference < 0.2
    assert {path.name for path in folder.iterdir()} == {file.name for file in written} | {
        export.CARD
    }


def test_another_program_runs_any_batch(exported, tmp_path):
    """The two programs of launch/README.md: JAX alone, and onnxruntime alone."""
    folder, net, shift, _ = exported
    programs = re.findall(
        r"```py\n(.*?)```", (ROOT / "launch/README.md").read_text(), flags=re.DOTALL
    )
    assert len(programs) == 2
    np.save(tmp_path / "images.npy", IMAGES[:5])
    for i, program in enumerate(programs):
        code = f"""
import sys, numpy as np
images = np.load({str(tmp_path / "images.npy")!r})
{program.replace("student/", f"{folder}/")}
np.save({str(tmp_path / f"{i}.npy")!r}, logits)
assert not {{'flax', 'distill_jax'}} & set(sys.modules)
"""
        subprocess.run([sys.executable, "-I", "-c", code], check=True)
        expected = net.logits(IMAGES[:5]) + np.float32(shift)
        np.testing.assert_allclose(np.load(tmp_path / f"{i}.npy"), expected, atol=1e-5)


def test_a_program_holds_no_paths_of_this_machine(exported):
    folder, *_ = exported
    content = (folder / "net.stablehlo").read_bytes()
    assert b"distill_jax" not in content and b".py" not in content


def test_the_card_says_what_the_net_is(exported):
    folder, net, shift, written = exported
    card = export.read_card(folder)
    assert card["class_names"] == ["a", "b", "c"] and card["shift"] == shift
    assert card["fingerprint"] == net.fingerprint and card["inputs"]["shape"] == [8, 8]
    assert card["parameters"] == models.parameter_count(net.params)
    for file, described in zip(written, card["files"], strict=True):
        assert described["size"] == file.size
        assert described["file_sha256"] == files.sha256(folder / file.name)


def test_weights_of_8_bits_are_within_half_a_step():
    kernel = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    kernel[..., 2] = 0
    params = {"kernel": kernel, "bias": kernel[0, 0]}
    found = export.quantize(params)
    assert found["kernel"].values.dtype == jnp.int8
    again = export.dequantize(found)
    np.testing.assert_array_equal(again["bias"], params["bias"])
    with_state = export.quantize(models.Variables(params, {"u": kernel}))
    np.testing.assert_array_equal(with_state.state["u"], kernel)
    assert isinstance(with_state.params["kernel"], export.Quantized)
    step = np.abs(kernel).max((0, 1)) / 127
    assert (np.abs(again["kernel"] - kernel) <= 0.5001 * step).all()


def test_trees_of_inputs(tmp_path):
    def apply(params, inputs, dropout_key=None):
        return MLP.apply(params, inputs["image"]) * inputs["weight"][:, None]

    own = models.Model(lambda key, inputs: MLP.init(key, inputs["image"]), apply)
    inputs = {"image": IMAGES, "weight": np.linspace(0, 1, 9, dtype=np.float32)}
    net = nets.Net(own, MLP.init(jax.random.key(0), IMAGES[:1]), [], 0.0, None, {})
    written = export.write(tmp_path / "net", net, inputs, formats=["stablehlo", "onnx"])
    assert [file.changed for file in written] == [0, 0]


def test_a_generalist_with_its_specialists(tmp_path):
    sets, corrections = np.array([[0, 1], [1, 2]], np.int32), np.float32([0.5, -0.25])
    trunk, parts = models.conv_trunk([4], [2]), models.mlp([8], tiny.CLASSES)
    generalist = net_of(models.chain(trunk, parts))
    features = np.asarray(trunk.apply(generalist.params, IMAGES))
    model = models.mlp([8], heads.UNIT.outputs(2, tiny.CLASSES))
    init = jax.vmap(lambda key: model.init(key, features[:1]))
    about = {"inputs": nets.describe_inputs(features)}
    net = nets.Net(model, init(jax.random.split(jax.random.key(1), 2)), [], 0.0, 2, about)
    two = store.Specialists(net, heads.UNIT, sets, corrections, tiny.CLASSES)
    (file,) = export.write_specialists(tmp_path / "all", generalist, two, IMAGES, n=1)
    assert file.difference < 1e-5 and export.read_card(tmp_path / "all")["n"] == 1
    logits = generalist.logits(IMAGES)
    active, q = inference.predict_all(two, jnp.asarray(logits), jnp.asarray(features))
    np.testing.assert_allclose(q, inference.predict(two, logits, features), atol=1e-6)
    np.testing.assert_array_equal(active, [[c in own for own in sets] for c in logits.argmax(-1)])
    with pytest.raises(UserError, match="the specialists are of generalist other, not "):
        export.write_specialists(
            tmp_path / "x", generalist, two._replace(generalist="other"), IMAGES
        )


def test_nothing_is_lost(exported, tmp_path, monkeypatch):
    folder, net, *_ = exported
    before = (folder / export.CARD).read_text()
    with pytest.raises(UserError, match="holds an export: name another folder, or overwrite it"):
        export.write(folder, net, IMAGES, formats=["safetensors"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match=r"holds thesis.txt, so an export is not written there"):
        export.write(tmp_path / "mine", net, IMAGES, formats=["safetensors"])
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"net.safetensors gives logits that differ"):
        export.write(folder, net, IMAGES, formats=["safetensors"], overwrite=True)
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_sealed", full)
    with pytest.raises(UserError, match=r"can't be written to .*: No space left on device"):
        export.write(folder, net, IMAGES, formats=["safetensors"], overwrite=True)
    assert (folder / export.CARD).read_text() == before
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


def test_an_export_replaces_another(tmp_path):
    for seed in (0, 1):
        net = net_of(MLP, seed=seed)
        export.write(tmp_path / "net", net, IMAGES, formats=["safetensors"], overwrite=bool(seed))
        assert export.read_card(tmp_path / "net")["fingerprint"] == net.fingerprint
    card = tmp_path / "net" / export.CARD
    card.write_text(json.dumps(json.loads(card.read_text()) | {"version": 99}))
    with pytest.raises(
        UserError, match=r"version 99; this program reads distill_jax.export version 1"
    ):
        export.read_card(tmp_path / "net")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"formats": ["pickle"]},
            "format is 'pickle'; allowed: 'stablehlo', 'onnx' or 'safetensors'",
        ),
        ({"shift": [1.0]}, r"shift is \(1,\) for 3 classes"),
        ({"class_names": ["a"]}, "there are 1 names for 3 classes"),
        (
            {"inputs": IMAGES[:, :4]},
            r"inputs are \[4, 8\] each, but the net was trained on \[8, 8\]",
        ),
        ({"net": net_of(MLP)._replace(members=2)}, "there are 2 nets: export one"),
    ],
)
def test_what_does_not_fit(tmp_path, change, message):
    arguments = {"net": net_of(MLP), "inputs": IMAGES, "formats": ["safetensors"], **change}
    with pytest.raises(UserError, match=message):
        export.write(tmp_path / "net", **arguments)


def test_models_that_a_format_can_not_hold(tmp_path):
    narrow = net_of(models.mlp([8], tiny.CLASSES, dtype=jnp.bfloat16))
    with pytest.raises(
        UserError, match=r"net.onnx was written, but can't be run: .*NOT_IMPLEMENTED"
    ):
        export.write(tmp_path / "net", narrow, IMAGES, formats=["onnx"])
    of_nine = models.Model(MLP.init, lambda params, x, key=None: MLP.apply(params, x[: len(x)]))
    with pytest.raises(UserError, match="the model can't be exported for any batch: "):
        export.write(tmp_path / "net", net_of(of_nine), IMAGES, formats=["stablehlo"])
    assert not list(tmp_path.iterdir())
