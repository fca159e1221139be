"""What the fields of the studies' configs may be."""

import importlib
import math
import types

import pytest
from ml_collections import ConfigDict

from distill_jax.errors import UserError
from experiments.common.config import allowed, check_config, flat

STUDIES = {
    name: importlib.import_module(f"experiments.{name}.config")
    for name in ("custom", "mnist", "speech", "specialists")
}
SWEPT = [name for name, module in STUDIES.items() if hasattr(module, "sweep")]


def config_of(study, changes=types.MappingProxyType({}), preset="smoke"):
    config = STUDIES[study].get_config(preset)
    config.update_from_flattened_dict(dict(changes))
    return config


@pytest.mark.parametrize("study", STUDIES)
def test_every_preset_is_allowed_and_every_field_declared(study):
    module = STUDIES[study]
    for preset in module.PRESETS:
        config = module.get_config(preset)
        check_config(config.lock())
        for name in flat(config.to_dict()):
            allowed(module, name)  # a StopIteration if it isn't declared
    assert set(module.ALLOWED) <= set(flat(config.to_dict()))


@pytest.mark.parametrize("study", SWEPT)
def test_every_point_of_every_sweep_is_allowed(study):
    with pytest.raises(ValueError, match="no sweep ''; there are ") as raised:
        STUDIES[study].sweep("")
    for name in str(raised.value).partition("there are ")[2].split(", "):
        for point in STUDIES[study].sweep(name):
            check_config(config_of(study, point, preset="default"))


@pytest.mark.parametrize("study", STUDIES)
def test_the_value_of_every_field_is_checked(study):
    """There is no field that may be anything."""
    names = flat(STUDIES[study].get_config().to_dict())
    for name in names:
        config = config_of(study).to_dict()
        part, _, last = name.rpartition(".")
        (config[part] if part else config)[last] = None
        with pytest.raises(UserError, match=rf"^--config\.{name} is "):
            check_config(ConfigDict(config))


WRONG = [
    ("mnist", "distilled.temperature", -4.0), ("mnist", "distilled.temperature", 0.0),
    ("mnist", "distilled.temperature", math.inf), ("mnist", "distilled.hard_weight", 5.0),
    ("mnist", "unlabelled.hard_weight", -0.5), ("mnist", "selection", "best"),
    ("mnist", "teacher.report_every", 0), ("mnist", "teacher.epochs", 0),
    ("mnist", "teacher.batch_size", 0), ("mnist", "teacher.micro_batches", -1),
    ("mnist", "teacher.hidden", ()), ("mnist", "teacher.hidden", (100, 0)),
    ("mnist", "teacher.hidden", (100.5,)), ("mnist", "seeds", ()), ("mnist", "seeds", (0, 0)),
    ("mnist", "seeds", (-1,)), ("mnist", "seeds", (2**32,)), ("mnist", "seeds", ("0",)),
    ("mnist", "teacher.hidden_dropout", 1.5), ("mnist", "teacher.jitter", -1),
    ("mnist", "baseline.learning_rate", math.nan), ("mnist", "fractions.percentages", (0.0,)),
    ("mnist", "fractions.percentages", (200.0,)), ("mnist", "fractions.percentages", (3.0, 3.0)),
    ("mnist", "sweep.temperatures", (1.0, 1.0000001)), ("mnist", "sweep.widths", ()),
    ("mnist", "mesh.data", 0), ("mnist", "mesh.member", -2), ("mnist", "teacher.dtype", "int8"),
    ("mnist", "teacher.optimizer", "adamw"), ("mnist", "data.train_examples", -1),
    ("mnist", "unlabelled.labels_known", 1.5), ("mnist", "study", "experiments.mnst.study"),
    ("mnist", "study", "experiments.mnist"), ("mnist", "data.source", ""),
    ("speech", "soft_targets.mean", "harmonic"), ("speech", "soft_targets.encoding", "dense"),
    ("speech", "soft_targets.temperatures", ()), ("speech", "compression.k", (8, 0)),
    ("speech", "fractions.percent", 101.0), ("speech", "ensemble.members", (1, 1)),
    ("speech", "ensemble.at_once", 0), ("speech", "decoding.members", 0),
    ("specialists", "specialists.kind", "dustbin"), ("specialists", "soft.kinds", ("unit", "all")),
    ("specialists", "generalist.activation", "tanh"), ("specialists", "clusters.count", 0),
    ("specialists", "data.validation", 1.0), ("specialists", "data.difficulty", -1.0),
    ("specialists", "specialists.active_by", 0), ("specialists", "data.views", 0),
]  # fmt: skip


@pytest.mark.parametrize(("study", "name", "value"), WRONG)
def test_a_value_that_is_not_allowed_is_named_with_what_is(study, name, value):
    with pytest.raises(UserError) as raised:
        check_config(config_of(study, {name: value}))
    message = str(raised.value)
    assert message.startswith(f"--config.{name} is {value!r}; allowed: ") and "\n" not in message


CONFLICTS = [
    (
        "mnist",
        {"teacher.epochs": 8, "teacher.report_every": 3},
        "teacher.epochs is 8; allowed: mult",
    ),
    (
        "mnist",
        {"omissions.report_every": 3, "omissions.epochs": 6},
        "omissions.only_7_8_epochs is 40",
    ),
    ("mnist", {"selection": "validation"}, "data.validation is 0"),
    ("mnist", {"sweep.jitter": 1}, "sweep.jitter is 1; allowed: 0"),
    (
        "mnist",
        {"distilled.temperature_ramp": (8.0, 0.0, 10)},
        "distilled.temperature_ramp is (8.0, 0.0, 10); allowed: (), or (from, to, steps) with",
    ),
    (
        "mnist",
        {"distilled.hard_weight_ramp": (0.0, 0.5)},
        "distilled.hard_weight_ramp is (0.0, 0.5); allowed: (), or (from, to, steps) with",
    ),
    ("mnist", {"data.block_examples": 500}, "it is of images:, tfds: sources alone"),
    ("mnist", {"data.validation": 4000}, "data.validation is 4000 of 4000"),
    (
        "mnist",
        {"data.train_examples": 150},
        "unlabelled.batch_size is 100, but it is trained on 75",
    ),
    ("mnist", {"mesh.member": -1}, "one size of -1"),
    (
        "mnist",
        {"data.source": "tfds:mnist", "data.block_examples": 50},
        "teacher.batch_size is 100",
    ),
    (
        "mnist",
        {"sweep.micro_batches": 3},
        "sweep.micro_batches is 3; allowed: divisors of batch_size, 100",
    ),
    ("speech", {"distilled.temperature": 3.0}, "distilled.temperature is 3.0; allowed: one of"),
    ("speech", {"fractions.temperature": 3.0}, "fractions.temperature is 3.0; allowed: one of"),
    (
        "speech",
        {"data.train_frames": 1000},
        "fractions.batch_size is 128; its training set has at most 100",
    ),
    ("speech", {"decoding.members": 4}, "the ensemble has 3"),
    ("speech", {"unlabelled.seeds": 3}, "unlabelled.seeds is 3; there are 2 seeds"),
    ("speech", {"temperature.epochs": 3}, "temperature.epochs is 3; allowed: multiples of"),
    ("speech", {"unlabelled.jitter": 1}, "unlabelled.jitter is 1; allowed: 0"),
    ("specialists", {"generalist.strides": (2,)}, "strides is (2,); allowed: one for each of chan"),
    ("specialists", {"generalist.input_dropout": 0.1}, "use hidden_dropout"),
    ("specialists", {"generalist.jitter": 1}, "generalist.jitter is 1; allowed: 0"),
    ("specialists", {"clusters.size": 60}, "clusters.size is 60; allowed: up to 59"),
    ("specialists", {"clusters.count": 61}, "clusters.count is 61; allowed: up to 60"),
    ("specialists", {"specialists.batch_size": 63}, "allowed: even numbers"),
    ("specialists", {"soft.count": 5}, "allowed: up to clusters.count, 4"),
    ("specialists", {"controls.epochs": 3}, "controls.epochs is 3; allowed: multiples of"),
    ("specialists", {"distilled.scratch_epochs": 3}, "distilled.scratch_epochs is 3"),
    ("specialists", {"data.difficulty": 0.0}, "data.views is 2; allowed: 1"),
    ("mnist", {"mesh.member": 2}, "seeds: 1 nets don't divide over mesh.member, 2"),
    (
        "mnist",
        {"mesh.model": 4},
        "sweep.widths is (30, 30); its layers don't divide over mesh.model, 4",
    ),
    ("speech", {"mesh.member": 2}, "ensemble.members: 3 nets, trained 3 at a time, don't"),
    ("speech", {"soft_targets.encoding": "sampled", "soft_targets.k": 2**16}, "up to 32768 draws"),
    ("specialists", {"mesh.member": 2}, "seeds: 2 nets, trained 1 at a time, don't"),
    ("specialists", {"data.side": 32}, "it is of npz:, idx:, images:, tfds: sources alone"),
    ("specialists", {"data.data_dir": "x"}, "allowed: '' for all but tfds:"),
    ("mnist", {"data.side": 14}, "data.side is 14; allowed: 0 for embedded"),
    ("mnist", {"data.source": "idx:x", "data.test_share": 0.1}, "of npz:, images: sources alone"),
    ("mnist", {"data.source": "idx:x", "data.data_dir": "y"}, "data.data_dir is 'y'; allowed: ''"),
]


@pytest.mark.parametrize(("study", "changes", "message"), CONFLICTS)
def test_values_that_do_not_fit_each_other(study, changes, message):
    with pytest.raises(UserError) as raised:
        check_config(config_of(study, changes))
    assert message in str(raised.value) and str(raised.value).startswith("--config.")


def test_values_of_sections_that_are_not_used_need_not_fit():
    check_config(config_of("mnist", {"sweep.jitter": 1}), sections=["teacher", "mesh"])


def test_the_fields_are_those_of_the_study():
    config = config_of("mnist").to_dict()
    with pytest.raises(UserError, match=r"^--config\.mine: the study has no such field$"):
        check_config(ConfigDict({**config, "mine": 1}))
    del config["teacher"]["epochs"]
    with pytest.raises(UserError, match=r"^--config\.teacher\.epochs: the field is missing$"):
        check_config(ConfigDict(config))
