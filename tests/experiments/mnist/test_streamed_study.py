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

from distill_jax import sharding, soft_targets
from distill_jax.data import stream
from distill_jax.nets import read_meta
from experiments.common.run import run_study
from experiments.common.study import Context, read_json
from experiments.common.training import curve
from experiments.compiled import targets
from experiments.compiled.check import check
from experiments.mnist import programs, study
from experiments.mnist.config import get_config
from experiments.mnist.data import (
    load_data,
    open_data,
    training_set,
    training_set_with_targets,
)


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
    for net in (config.baseline, config.objectives):
        net.batch_size = 16
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


def test_the_programs_for_machines_that_are_not_there_are_of_blocks(data_dir, streamed):
    workdir, _ = streamed
    config = config_of(data_dir)
    stores = {"soft_targets": workdir / "stages/soft_targets"}
    context = Context(config, workdir, stores)
    read = {
        "teacher": training_set(config, config.teacher),
        "distilled": training_set_with_targets(context, config.distilled),
    }
    mesh = sharding.make_mesh()
    listed = {one.name: one for stage, one in programs.programs(config) if stage in read}
    assert listed.keys() == read.keys()
    for name, one in listed.items():
        block = read[name].put(next(read[name].open_blocks(0)), mesh)
        there = {field: (x.shape, x.dtype) for field, x in block.items()}
        members = {field: (2,) if field in one.own else () for field in one.fields}
        assert there == {f: ((*members[f], *x.shape), x.dtype) for f, x in one.fields.items()}
        assert read[name].per_member == {field: field in one.own for field in one.fields}
        assert (read[name].steps, read[name].inputs) == (one.blocks.steps, one.blocks.inputs)


def test_they_compile_with_two_blocks_on_each_device(data_dir):
    config, machines = config_of(data_dir), targets.parse(["cpu:2"])
    with jax.numpy_dtype_promotion("standard"):
        records = check(config, programs.programs, programs.passes, machines, STAGES)
    teacher, distilled = (record for record in records if record["what"] == "training")
    assert [record["program"] for record in records][-1] == "soft_targets: logits"
    image, logits, numbers = 10 * 10, 2 * 10 * 4, 2 * 4
    block = 3 * 16 // 2 * (image + numbers)  # three steps of 16, of which a device has half
    own = 3 * 16 // 2 * logits
    assert distilled["arguments"] - teacher["arguments"] == pytest.approx(2 * own, abs=100)
    assert teacher["arguments"] > 2 * block and all(record["fits"] for record in records)


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
