"""The MNIST study on sets that people bring: which classes there are, in which order, and on disk."""

import importlib
from pathlib import Path

import image_sets
import numpy as np
import pytest
import tiny

from distill_jax.errors import UserError
from experiments.common import report
from experiments.common.image_sets import check_source
from experiments.common.run import plan
from experiments.common.study import Context, draw_report
from experiments.mnist import distillation, figures, study, transfer_sets
from experiments.mnist.config import get_config
from experiments.mnist.data import load_data, open_data
from experiments.mnist.nets import of_mnist


def config_of(source, **fields):
    config = get_config("smoke")
    config.data.update(source=source, train_examples=0, test_examples=0, **fields)
    return config


def test_a_folder_on_disk_has_the_examples_of_the_one_in_memory(tmp_path):
    source = image_sets.write_folders(tmp_path, image_sets.arrays(colour=True)[0])
    fields = {"test_share": 0.25, "side": 4, "validation": 3}
    whole = load_data(config_of(source, **fields))
    data = open_data(config_of(source, **fields, block_examples=4))
    assert data.train == {} and data.streamed.size == len(whole.train["id"]) == 6
    tiny.assert_equal(data.streamed.read(np.arange(6)), whole.train)
    tiny.assert_equal((data.validation, data.test), (whole.validation, whole.test))
    before = check_source(config_of(source, **fields))
    (tmp_path / "cat" / "0.png").unlink()
    assert check_source(config_of(source, **fields)) != before


def test_the_first_examples_of_a_set_that_is_ordered_by_class(tmp_path):
    train, test = image_sets.arrays()
    ordered = train[0], np.sort(train[1])
    source = image_sets.write_npz(tmp_path / "a.npz", ordered, test)
    message = r"data\.train_examples is 8, but the set is ordered by class, .* not of all 3"
    config = config_of(source)
    config.data.train_examples = 8
    with pytest.raises(UserError, match=message):
        load_data(config)
    config.data.train_examples = 12
    assert len(load_data(config).train["id"]) == 12


def test_what_does_not_fit_a_set_is_told_before_anything_is_run(tmp_path):
    source = image_sets.write_npz(tmp_path / "a.npz", *image_sets.arrays())

    def message(name, **more):
        make = importlib.import_module(f"experiments.{name}.config").get_config
        made = importlib.import_module(f"experiments.{name}.study").STUDY
        config = make("smoke")
        config.data.update(source=source, **more)
        with pytest.raises(UserError) as caught:
            plan(config, tmp_path / "new", made)
        return str(caught.value)

    assert message("mnist").startswith(
        "--config.data.train_examples is 4000; allowed: 0 (all) to 12"
    )
    more = {"train_examples": 0}
    assert "test_examples is 2000; allowed: 0 (all) to 6" in message("mnist", **more)
    more = {"train_examples": 0, "test_examples": 0}
    expected = "--config.teacher.batch_size is 100, but it is trained on 12 examples"
    assert message("mnist", **more) == expected
    assert "data.classes is 60; allowed: 0 (all) to 3" in message("specialists")
    assert "clusters.count is 4; allowed: up to 3" in message("specialists", classes=0)


def test_stages_of_classes_that_a_set_lacks_have_no_rows(tmp_path, capsys):
    source = image_sets.write_npz(tmp_path / "a.npz", *image_sets.arrays())
    context = Context(config_of(source), tmp_path, {})
    assert transfer_sets.without_3(context) == transfer_sets.only_7_8(context) == []
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{what}: left out, as {source} has 3 classes, and {classes} with others are needed"
        for what, classes in (("without 3s", "3"), ("only 7s and 8s", "7 and 8"))
    ]


@pytest.mark.parametrize(
    ("source", "is_mnist"),
    [("embedded", 1), ("tfds:mnist:3.0.1", 1), ("tfds:mnist_corrupted", 0), ("images:mnist", 0)],
)
def test_published_numbers_stand_beside_mnist_alone(source, is_mnist, tmp_path, monkeypatch):
    assert of_mnist(config_of(source), 67) == (67 if is_mnist else None)
    shown = {}
    monkeypatch.setattr(report, "write", lambda *_, **more: shown.update(more))
    rows = [{"source": source, "table": "mnist"}]
    reference = Path(study.__file__).with_name("reference.json")
    draw_report(tmp_path, rows, [], title="", captions={}, reference=reference)
    assert bool(shown["reference_rows"]) == bool(is_mnist)


@pytest.mark.parametrize(("classes", "drawn"), [(3, 0), (4, 1), (10, 4), (100, 4)])
def test_telling_images_of_any_number_of_classes(classes, drawn):
    labels = np.arange(12) % min(classes, 10)
    examples = {"inputs": np.zeros((12, 4, 4, 3), np.uint8), "label": labels}
    logits, names = (
        np.eye(classes, dtype=np.float32)[labels],
        [f"class {c}" for c in range(classes)],
    )
    found = distillation.telling_digits(examples, logits, names)
    assert len(found) == drawn
    figure = figures.digits(found)
    assert figure.axes[0].get_title() == "class 2, most like class 0" if drawn else figure is None
