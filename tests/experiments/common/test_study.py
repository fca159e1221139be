"""What the stages of a study may read of its config, and what of it makes them run again."""

import importlib
import re

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from distill_jax import step_losses
from distill_jax.errors import UserError
from experiments.common import training
from experiments.common.config import net_section
from experiments.common.study import (
    Context,
    Stage,
    make_context,
    read_json,
    run_stages,
    write_arrays,
)

CONFIG = {"preset": "smoke", "mesh": {"data": -1}, "a": {"x": 1}, "b": {"x": 2}, "c": 3}


def stage(name, needs=(), sections=(), reads=(), ran=None):
    """One that reads some sections, and makes a row of their values."""

    def run(context):
        if ran is not None:
            ran.append(name)
        return [{"row": name, "values": [str(context.config[read]) for read in reads]}]

    return Stage(name, run, needs, sections)


def test_a_stage_reads_its_sections_and_those_of_all_that_it_builds_on(tmp_path):
    stages = (
        stage("first", sections=("a",), reads=("a", "preset", "mesh")),
        stage("second", needs=("first",), sections=("b",), reads=("a", "b")),
        stage("third", needs=("second",), reads=("a", "b")),
    )
    run_stages(ConfigDict(CONFIG), tmp_path, stages)
    rows = read_json(tmp_path / "results.json")
    assert rows[1]["values"] == rows[2]["values"] == [str(ConfigDict(CONFIG)[n]) for n in "ab"]
    third = make_context(ConfigDict(CONFIG), tmp_path, stages, stages[2]).config
    assert third.to_dict() == {name: CONFIG[name] for name in ("preset", "mesh", "a", "b")}
    assert third.a.x == 1 and third["b"].x == 2 and "c" not in third


@pytest.mark.parametrize(
    "read",
    [
        lambda config: config.c,
        lambda config: config["c"],
        lambda config: config.get("c"),
        lambda config: config.study,
    ],
)
def test_what_a_stage_does_not_declare_is_an_error_that_names_both(tmp_path, read):
    stages = (stage("other", sections=("c",)), Stage("wrong", lambda c: read(c.config), (), ("a",)))
    message = (
        r"stage wrong reads the config's '(c|study)', which neither it nor a stage that it needs"
    )
    with pytest.raises(RuntimeError, match=message):
        run_stages(ConfigDict(CONFIG), tmp_path, stages)
    assert not (tmp_path / "stages/wrong/stage.json").exists()


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"a": {"x": 5}}, ["first", "second", "third"]),
        ({"b": {"x": 5}}, ["second", "third"]),
        ({"c": 5}, []),
        ({"preset": "full", "mesh": {"data": 1}}, []),
    ],
)
def test_only_stages_that_build_on_what_changed_run_again(tmp_path, changed, again):
    ran: list[str] = []
    stages = (
        stage("first", sections=("a",), ran=ran),
        stage("second", ("first",), ("b",), ran=ran),
        stage("third", ("second",), ran=ran),
    )
    run_stages(ConfigDict(CONFIG), tmp_path / "one", stages)
    ran.clear()
    other = ConfigDict({**CONFIG, **changed})
    run_stages(other, tmp_path / "two", ())
    (tmp_path / "two/stages/first").mkdir(parents=True)
    (tmp_path / "two/stages/first/left").touch()
    run_stages(other, tmp_path / "two", stages, reuse=[tmp_path / "nothing", tmp_path / "one"])
    assert ran == again
    assert (tmp_path / "two/stages/first/left").exists() == ("first" in again)
    assert not list(tmp_path.glob("**/*.partial"))


def test_a_working_directory_belongs_to_one_config(tmp_path):
    run_stages(ConfigDict(CONFIG), tmp_path, ())
    run_stages(ConfigDict({**CONFIG, "mesh": {"data": 4}}), tmp_path, ())
    message = re.escape(
        f"{tmp_path} belongs to another config: a.x is 1 there and 7 now, c is 3 there and None now, "
        "d is None there and 'new' now. Choose another --workdir"
    )
    other = {name: CONFIG[name] for name in ("preset", "mesh", "b")} | {"a": {"x": 7}, "d": "new"}
    with pytest.raises(UserError, match=message):
        run_stages(ConfigDict(other), tmp_path, ())


def test_arrays_are_there_whole_or_not_at_all(tmp_path):
    write_arrays(tmp_path / "a.npz", x=np.arange(3), y=np.eye(2))
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["x"], [0, 1, 2])

    class Fails:
        def __array__(self, *arguments, **options):
            raise RuntimeError("no array")

    with pytest.raises(RuntimeError, match="no array"):
        write_arrays(tmp_path / "a.npz", x=np.arange(5), y=Fails())
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["x"]) == 3 and len(list(tmp_path.iterdir())) == 1


def data_of(keys):
    return [tuple(one) for one in np.asarray(jax.random.key_data(keys)).tolist()]


def test_keys_are_of_seed_stage_and_training_and_not_of_names(tmp_path):
    context = Context(ConfigDict(), tmp_path / "a", {}, 3)
    keys = data_of(context.keys((0, 1, 7)))
    assert len(set(keys)) == 3
    assert data_of(context.keys((7, 0))) == [keys[2], keys[0]]  # whichever others there are
    assert keys == data_of(context._replace(directory=tmp_path / "b").keys((0, 1, 7)))
    others = [context._replace(stage=4).keys((0, 1, 7)), context.keys((0, 1, 7), training=1)]
    assert not set(keys) & {key for other in others for key in data_of(other)}


@pytest.mark.parametrize("study", ["mnist", "speech", "specialists"])
def test_every_stage_of_a_study_has_a_number_of_its_own(study):
    stages = importlib.import_module(f"experiments.{study}.study").STAGES
    numbers = [stage.number for stage in stages]
    assert 0 not in numbers and len(set(numbers)) == len(numbers)


def test_a_renamed_training_gives_the_same_nets(tmp_path):
    section = ConfigDict(net_section(hidden=(4,), epochs=1, batch_size=8))
    mesh = {"member": 1, "data": -1, "model": 1}
    config = ConfigDict({"seeds": (0,), "selection": "last", "mesh": mesh, "data": {}})
    context = Context(config, tmp_path, {}, 1)
    found = []
    for name in ("one", "another"):
        with jax.numpy_dtype_promotion("standard"):  # for optax's schedules
            trained = training.train(
                config,
                section,
                training.build_model(section, tiny.CLASSES),
                [tiny.examples(16)],
                step_losses.label_loss,
                keys=context.keys((0,)),
                directory=tmp_path / name,
                name=name,
            )
        found.append(trained.params)
    tiny.assert_equal(*found)
