"""The MNIST study on a set that is left on disk: the same stages, killed and resumed."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from ml_collections import ConfigDict
from tfds_sets import prepare_tiny

from distill_jax import soft_targets
from distill_jax.data import stream
from distill_jax.nets import read_meta
from experiments.common.run import run_study
from experiments.common.study import read_json
from experiments.common.training import curve
from experiments.mnist import study
from experiments.mnist.config import get_config
from experiments.mnist.data import load_data, open_data


def config_of(data_dir, block_examples=70):
    """The MNIST study of two seeds on a tiny TFDS set: 190 examples, 20 held out."""
    config = get_config("smoke")
    config.seeds = (0, 1)
    config.data.update(source="tfds:tiny", data_dir=str(data_dir), train_examples=190)
    config.data.update(test_examples=0, validation=20, block_examples=block_examples)
    small = {"hidden": (16,), "batch_size": 16, "epochs": 2, "save_every": 2}
    small["learning_rate"] = 0.02
    config.teacher.update(small, jitter=1)
    config.distilled.update(small)
    return config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Ten classes of images: a bright line that says which, and noise."""
    folder = tmp_path_factory.mktemp("tfds")
    random = np.random.default_rng(1)
    labels = random.integers(0, 10, 200)
    images = random.integers(0, 100, (200, 10, 10), np.uint8)
    images[np.arange(200), labels] += 155
    splits = {"train": (images, labels), "test": (images[:50], labels[:50])}
    prepare_tiny(folder, splits, label_feature=tfds.features.ClassLabel(num_classes=10))
    return folder


STAGES = ("teacher", "soft_targets", "distilled")


def run(config: ConfigDict, workdir: Path):
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic promotes
        run_study(config, workdir, study.STUDY, only=STAGES)
    curves = {
        stage: curve(read_meta(workdir / f"stages/{stage}/{stage}")["history"])
        for stage in ("teacher", "distilled")
    }
    rows = [{**row, "seconds": 0} for row in read_json(workdir / "results.json")]
    return rows, curves


@pytest.fixture(scope="module")
def streamed(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("streamed")
    return workdir, run(config_of(data_dir), workdir)


def test_the_study_streams(data_dir, streamed):
    workdir, (rows, curves) = streamed
    assert [row["row"] for row in rows] == ["teacher 1x16", "distilled 1x16, T=20"]
    # 170 examples are 10 batches of 16; blocks of 4 would leave two of them over.
    assert stream.cut(170, 16, 70) == (3, 3)
    for own in curves.values():
        assert own["epoch"] == pytest.approx(np.arange(1, 7) / 3)
        assert np.mean(own["train_loss"][-1]) < np.mean(own["train_loss"][0])
        assert np.shape(own["validation_errors"]) == (len(own["epoch"]), 2)
    data = open_data(config_of(data_dir))
    assert data.train == {} and data.streamed.size == 170
    whole = load_data(config_of(data_dir, block_examples=0))
    tiny.assert_equal(data.streamed.read(np.arange(170)), whole.train)
    tiny.assert_equal(data.validation, whole.validation)
    for seed in (0, 1):
        store = soft_targets.load(workdir / f"stages/soft_targets/seed_{seed}", num_classes=10)
        soft_targets.attach(whole.train, store, 20.0)  # made of the same images


class Killed(BaseException):
    """No stage can continue after it."""


def test_a_killed_study_resumes_to_the_same_numbers(data_dir, streamed, tmp_path, monkeypatch):
    """Killed in the second epoch of the last stage, which resumes from its last checkpoint."""
    finished, expected = streamed
    workdir = tmp_path / "work"
    shutil.copytree(finished, workdir)
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / "stages/distilled")
    blocks, opened = stream.blocks, []

    def dies(*arguments, **options):
        for number, block in enumerate(blocks(*arguments, **options)):
            if number == 5:
                raise Killed
            yield block

    def counted(*arguments, first_block):
        opened.append(first_block)
        return blocks(*arguments, first_block=first_block)

    monkeypatch.setattr(stream, "blocks", dies)
    with pytest.raises(Killed):
        run(config_of(data_dir), workdir)
    monkeypatch.setattr(stream, "blocks", counted)
    assert run(config_of(data_dir), workdir) == expected
    assert opened == [4]


def test_stages_that_cut_the_set_up_hold_it_in_memory(data_dir):
    data = load_data(config_of(data_dir))
    assert data.streamed is None and len(data.train["id"]) == 170
