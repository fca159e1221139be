"""The speech study's stage of soft targets, in parts and at once, in this process."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speech_configs import config_of
from stores import content

from distill_jax import soft_targets
from distill_jax.nets import Net
from experiments.common import training
from experiments.common.study import Context
from experiments.speech import nets, study, table1
from experiments.speech.data import load_data


@pytest.fixture(autouse=True)
def ensemble(monkeypatch):
    """Three nets that were never trained."""
    config = config_of()
    data = load_data(config)
    model = training.build_model(config.ensemble, data.num_classes, data.byte)
    keys = jax.random.split(jax.random.key(0), 3)
    params = jax.vmap(lambda key: model.init(key, jnp.zeros((1, 26, 40), jnp.uint8)))(keys)
    net = Net(model, jax.tree.map(np.asarray, params), [], 0.0, 3, {})
    monkeypatch.setattr(nets, "load_ensemble", lambda context: net)


@pytest.mark.parametrize("encoding", ["top_k", "sampled"])
def test_a_stage_in_parts_is_the_stage(encoding, tmp_path, monkeypatch, capsys):
    config = config_of()
    config.soft_targets.encoding = encoding
    whole, parts = (Context(config, tmp_path / name, {}) for name in ("whole", "parts"))
    stage = next(stage for stage in study.STAGES if stage.name == "soft_targets")
    assert stage.run(whole) == []
    output = capsys.readouterr().out
    each = 8 if encoding == "sampled" else 8 * (2 + 2) + 4  # below 256 states
    size = 8 + 2 * each  # a digest has 8; two temperatures
    frames = int(load_data(config).lengths.sum())
    for name in ("ensemble", "one"):
        assert f"{name}: {size} bytes a frame, at 2 temperatures" in output
        assert ("T=2: " in output) == (encoding == "top_k")
        store = nets.load_targets(config, whole.directory / name)
        assert store.meta["encoding"] == encoding and store.meta["num_examples"] == frames
        assert soft_targets.bytes_per_example(store) == size
    assert f"{frames}/{frames} frames" in output and "a second" in output
    # The groups in any order, and then the stage, which has no more to ask of the nets.
    groups = stage.groups(parts)
    assert len(groups) == nets.shard_count(config) == 3
    for group in reversed(groups):
        group()
    assert not list(parts.directory.glob("*/meta.json"))
    monkeypatch.delattr(nets, "member_logits")
    assert stage.run(parts) == []
    assert content(parts.directory) == content(whole.directory)


def test_runs_of_many_shards(tmp_path, monkeypatch):
    config = config_of()
    config.soft_targets.shard_rows = 10
    written = []
    monkeypatch.setattr(
        nets, "write_targets", lambda *_, shards, **options: written.append(list(shards))
    )
    groups = table1.soft_target_groups(Context(config, tmp_path, {}))
    assert 32 < len(groups) <= 64
    for group in groups:
        group()
    assert written[::2] == written[1::2]  # the ensemble's stores and the single net's
    assert [*itertools.chain(*written[::2])] == list(range(nets.shard_count(config)))
