"""Nets that learned from a larger corpus are measured on the embedded test utterances."""

import jax
import numpy as np
import pytest

from distill_jax import files, nets
from experiments.common import training
from experiments.common.study import Context
from experiments.speech import embedded_test, speech_frames
from experiments.speech.config import get_config
from experiments.speech.data import load_data
from experiments.speech.nets import accuracies


@pytest.fixture(scope="module")
def net():
    """Two nets of the preset smoke that have learned nothing."""
    config = get_config("smoke")
    data = load_data(config)
    model = training.build_model(config.distilled, data.num_classes, data.byte)
    keys = jax.random.split(jax.random.key(0), 2)
    params = jax.vmap(lambda key: model.init(key, np.zeros((1, 26, 40), np.uint8)))(keys)
    return nets.Net(model, params, [], 0.0, 2, {})


def test_the_whole_test_set_needs_no_second_row(net, tmp_path):
    config = get_config("smoke")
    config.data.test_frames = 0
    context = Context(config, tmp_path, {}, 0)
    assert embedded_test.rows(context, "distilled", net, 1.0) == []
    kept = files.read_json(tmp_path / embedded_test.CLASSES)
    np.testing.assert_array_equal(kept, load_data(config).class_of_state)


def test_a_part_is_measured_as_it_is_from_the_embedded_utterances_alone(net, tmp_path, monkeypatch):
    """Of a set with other utterances too; here the embedded one is made the smaller."""
    config = get_config("smoke")
    config.data.test_frames = 0
    load = speech_frames.load

    def first_hundred(source, **more):
        corpus = load(source, **more)
        return corpus._replace(splits={**corpus.splits, "test": corpus.splits["test"][:100]})

    load_data(config)
    monkeypatch.setattr(speech_frames, "load", first_hundred)
    (row,) = embedded_test.rows(Context(config, tmp_path, {}, 0), "distilled", net, 1.0)
    assert row["metric"] == "frame_accuracy_embedded_utterances"
    classes = files.read_json(tmp_path / embedded_test.CLASSES)
    for member, value in enumerate(row["values"]):
        assert embedded_test.test_accuracy(net.member(member), classes) == pytest.approx(value)
    assert row["values"] != list(accuracies(net, load_data(config).test))
