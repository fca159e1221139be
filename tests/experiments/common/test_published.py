"""A finished run is copied into a study's folder, and its nets are measured again."""

import importlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import experiments
from distill_jax import models, nets
from distill_jax.errors import UserError
from experiments import publish
from experiments.common.published import Published, check, draw, history
from experiments.common.published import publish as copy
from experiments.common.study import make_row

EXPERIMENTS = Path(experiments.__file__).parent
ROW = ("table", "small", "sum")
CONFIG = ConfigDict({"selection": "last", "preset": "full", "data": {"source": "embedded"}})


def total(net):
    return float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(net.params)))


PUBLISHED = {"small": Published("train/small", ROW, total, beside=("train/classes.json",))}


@pytest.fixture
def workdir(tmp_path):
    """A finished run of two nets."""
    model, inputs = models.mlp((4,), 3), np.zeros((2, 5), np.float32)
    params = jax.vmap(lambda key: model.init(key, inputs))(jax.random.split(jax.random.key(0), 2))
    history = [
        {"unit": e, "epoch": e, "step": 5 * e, "test_errors": [9 - e, 8 - e], "seconds": 1.0}
        for e in (1, 2)
    ]
    about = {"inputs": nets.describe_inputs(inputs[:1]), "num_classes": 3}
    both = nets.Net(model, jax.tree.map(np.asarray, params), history, 2.0, 2, about)
    nets.save(tmp_path / "run/stages/train/small", both, inputs=inputs)
    values = [total(both.member(m)) for m in range(2)]
    row = make_row(CONFIG, *ROW, values, seconds=2.0)
    (tmp_path / "run/results.json").write_text(json.dumps([row]))
    (tmp_path / "run/stages/train/classes.json").write_text("[0, 1, 1]")
    return tmp_path / "run"


def test_what_was_copied_is_measured_to_be_what_was_published(workdir, tmp_path):
    study = tmp_path / "study"
    copy(workdir, study, PUBLISHED, "two cores")
    (row,) = json.loads((study / "reference.json").read_text())
    assert row["device"] == "two cores"
    curves = json.loads((study / "history.json").read_text())
    assert curves == {"small": {"epoch": [1, 2], "test_errors": [[8, 7], [7, 6]]}}
    (found,) = check(study, PUBLISHED)
    assert found.agrees
    assert found.measured == found.published == row["values"][0]
    assert nets.load(study / "published/small").members == 1
    assert (study / "published/small/classes.json").read_text() == "[0, 1, 1]"


def test_trainings_of_two_stages_may_have_the_same_name(workdir):
    other = workdir / "stages/again/small"
    shutil.copytree(workdir / "stages/train/small", other)
    assert list(history(workdir)) == ["again/small", "train/small"]


@pytest.mark.parametrize("study", [path.parent for path in EXPERIMENTS.glob("*/history.json")])
def test_figures_are_drawn_of_what_was_published(study, tmp_path):
    figures = importlib.import_module(f"experiments.{study.name}.figures").published_figures
    for name in ("reference.json", "history.json"):
        shutil.copy(study / name, tmp_path)
    draw(tmp_path, figures)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert "curves.png" in names and names == {path.name for path in study.glob("*.png")}
    (tmp_path / "reference.json").write_text("[]")
    with pytest.raises(UserError, match="has no rows for the figure"):
        draw(tmp_path, figures)


def test_a_net_that_is_not_the_published_one_is_found(workdir, tmp_path):
    study = tmp_path / "study"
    copy(workdir, study, PUBLISHED, "two cores")
    rows = json.loads((study / "reference.json").read_text())
    rows[0]["values"][0] += 0.5
    (study / "reference.json").write_text(json.dumps(rows))
    assert [found.agrees for found in check(study, PUBLISHED)] == [False]
    near = {"small": PUBLISHED["small"]._replace(within=0.6)}
    assert [found.agrees for found in check(study, near)] == [True]


def test_a_run_without_a_published_row_changes_nothing(workdir, tmp_path):
    lacks = {"small": PUBLISHED["small"]._replace(row=("table", "large", "sum"))}
    with pytest.raises(UserError, match="has no row table, large, sum"):
        copy(workdir, tmp_path / "study", lacks, "two cores")
    assert not (tmp_path / "study").exists()


def test_only_the_preset_full_is_published(workdir):
    config = {"preset": "smoke", "study": "experiments.mnist.study"}
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is of preset smoke; published is full"):
        publish.main(str(workdir))
