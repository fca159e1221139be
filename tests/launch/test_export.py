"""The command that exports a net, as a user meets it."""

import jax
import numpy as np
import pytest
import tiny
from command import fails, run

from distill_jax import export, models, nets

IMAGES = tiny.examples(9)["inputs"]
MODEL = models.mlp([4], tiny.CLASSES)
MODULE = "launch.export"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two nets, with a few inputs beside them."""
    folder = tmp_path_factory.mktemp("net")
    init = jax.vmap(lambda key: MODEL.init(key, IMAGES[:1]))
    params = init(jax.random.split(jax.random.key(0), 2))
    about = {"inputs": nets.describe_inputs(IMAGES), "num_classes": tiny.CLASSES}
    nets.save(folder, nets.Net(MODEL, params, [], 0.0, 2, about), inputs=IMAGES)
    return folder


def test_a_net_is_exported_and_compared(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")
    options = ("--member=1", "--formats=stablehlo,safetensors", "--shift=2:1.5", "--int8")
    out = tmp_path / "out"
    said = run(str(folder), f"--out={out}", *options, f"--class_names={names}", module=MODULE)
    lines = said.splitlines()
    assert lines[0].startswith("net.stablehlo: ") and lines[0].endswith(
        "0.00 % of predictions changed"
    )
    assert lines[-1] == f"{out}: 4 files, and card.json"
    card = export.read_card(out)
    assert card["shift"] == [0, 0, 1.5] and card["class_names"] == ["a", "b", "c"]
    assert card["fingerprint"] == nets.load_net(folder, 1).fingerprint


def test_mistakes_end_with_one_line(folder, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    np.save(tmp_path / "other.npy", IMAGES[:, :2])
    nets.save(tmp_path / "bare", nets.load(folder))
    for arguments, message in (
        ((out,), "error: the net's folder is missing"),
        ((str(folder), out, "--shift=3:1"), "--shift names class 3; there are 0 to 2"),
        ((str(folder), out, f"--inputs={tmp_path / 'other.npy'}"), "was trained on [4, 4] each"),
        ((str(tmp_path / "bare"), out), "holds no inputs to compare on: name some by --inputs"),
    ):
        assert message in fails(*arguments, module=MODULE)
    assert not (tmp_path / "out").exists()
