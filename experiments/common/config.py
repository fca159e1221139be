"""What the studies' config files are built from: the section of a net, sweeps, and the check of values.

A study's config.py says beside its presets what each field may be: `ALLOWED` has the fields of the study
alone, `COMMON` below what all studies share, and `ranges.TABLE` what is so in the library too. And its
`conflicts(config)` names values that don't fit each other.

Nothing here imports JAX: configs are read before it is set up.
"""

import contextlib
import functools
import importlib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from distill_jax import ranges
from distill_jax.errors import UserError
from distill_jax.ranges import Allowed, above, below, count, either, one_of, several

Overrides = dict[str, Any]
"""Dotted config keys and their values: one point of a sweep."""


def product(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Every combination: `product({"a": [1, 2], "b": [3, 4]})` has four points."""
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def zipped(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """The first values together, the second together, and so on; all of one length."""
    return [dict(zip(values, point, strict=True)) for point in zip(*values.values(), strict=True)]


def net_section(**changes: Any) -> dict[str, Any]:
    """How one net is built and trained, with the given fields changed."""
    fields = {
        "hidden": (800, 800),
        "input_dropout": 0.0,
        "hidden_dropout": 0.0,
        "max_norm": 0.0,  # longest incoming weight vector of a hidden unit; 0: no limit
        "dtype": "float32",  # of the arithmetic; or bfloat16
        "gradient_dtype": "float32",  # of the gradients, and of their sums over devices
        # From so many, batch size x classes, the loss is fused with the output layer; 0: never.
        "fused_logits": 2**22,
        "jitter": 0,  # pixels
        "optimizer": "adam",  # or sgd, dropout_2012
        "momentum": 0.9,  # of sgd
        "learning_rate": 1e-3,
        "warmup_epochs": 1,  # at most half of all
        "batch_size": 512,
        "micro_batches": 1,
        "epochs": 20,
        "report_every": 1,  # epochs run as one program, between two evaluations
        "save_every": 5,  # reports between two checkpoints
    }
    return {**fields, **changes}


SEED = count(0, 2**31 - 1)
SEEDS = several(SEED, distinct=True)
WEIGHTS = several(above(0), distinct=True)
"""Numbers above 0, each of another net: temperatures, percentages."""

IMAGE_SETS = ("npz:", "idx:", "images:", "tfds:")
"""What the names of image sets begin with that people bring: those of `distill_jax.data.images`."""
STREAMED = ("images:", "tfds:")
"""Of these the ones that can be left on disk."""


def is_brought(source: str) -> bool:
    """Whether a set is one that a person brings, so that published numbers are not of it."""
    is_mnist = re.split("[/:]", source)[:2] == ["tfds", "mnist"]
    return source.startswith(IMAGE_SETS) and not is_mnist


_MESH = either(one_of(-1), count())

COMMON: dict[str, Allowed] = {
    "study": ranges.text(),
    "preset": ranges.text(),
    "seeds": SEEDS,
    "selection": one_of("last", "validation"),
    "mesh.member": _MESH,
    "mesh.data": _MESH,
    "mesh.model": _MESH,
    "data.source": ranges.text(),
    "data.data_dir": ranges.text(may_be_empty=True),
    "data.side": count(0),
    "data.test_share": below(1),
    "data.train_examples": count(0),
    "data.test_examples": count(0),
    "data.seed": SEED,
    # Of every section of a net, beside what is in `ranges.TABLE`.
    "hidden": several(count()),
    "dtype": one_of("float32", "bfloat16"),
    "gradient_dtype": one_of("float32", "bfloat16"),
    "optimizer": one_of("adam", "sgd", "dropout_2012"),
    "warmup_epochs": count(0),
    "at_once": count(),
    "init_scale": above(0),
    "temperature_ramp": several(ranges.any_number(), least=0),
    "hard_weight_ramp": several(ranges.any_number(), least=0),
}


def check_config(config: ConfigDict, sections: Collection[str] | None = None) -> None:
    """Checks all fields of a study's config, before anything is run; computes and reads nothing.

    Args:
        config: of the study.
        sections: that are used; fields of others are not checked against each other. None: all.

    Raises:
        UserError: for the first field that the study lacks, whose value isn't allowed, or that doesn't
            fit another one; it names the field, its value and what is allowed.
    """
    study = _config_module(str(config.get("study")))
    fields = flat(config.to_dict())
    known = _fields(study)
    for name in [*fields, *known]:
        if name not in known or name not in fields:
            has = "the study has no such field" if name not in known else "the field is missing"
            raise UserError(f"--config.{name}: {has}")
    for name, value in fields.items():
        ranges.check_value(f"--config.{name}", value, allowed(study, name))
    shared = itertools.chain(_mesh_conflicts(config), _micro_batch_conflicts(config))
    refuse(itertools.chain(shared, study.conflicts(config)), sections)


def refuse(conflicts: Iterable[str], sections: Collection[str] | None = None) -> None:
    """Raises a UserError for the first conflict that begins with a field of a section in use."""
    for conflict in conflicts:
        if sections is None or re.split(r"\W", conflict)[0] in sections:
            raise UserError(f"--config.{conflict}")


def allowed(study: ModuleType, name: str) -> Allowed:
    """What a field may be, by its dotted name, or as in all sections of nets by the last part of it."""
    last = name.rpartition(".")[2]
    places = ((study.ALLOWED, name), (COMMON, name), (COMMON, last), (ranges.TABLE, last))
    return next(table[key] for table, key in places if key in table)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested sections by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def changed(net: ConfigDict, **changes: Any) -> ConfigDict:
    """A section of the config with some fields changed."""
    return ConfigDict({**net.to_dict(), **changes})


def at(net: ConfigDict, name: str) -> Any:
    """A section's number, such as its "temperature"; or a dict of how it changes, if it has a ramp."""
    ramp = net[f"{name}_ramp"]
    return dict(zip(("from", "to", "steps"), ramp, strict=True)) if ramp else net[name]


def ramp_conflicts(config: ConfigDict, section: str) -> Iterator[str]:
    """Ramps that are none, or lead to numbers that are not allowed."""
    for name in [name for name in config[section] if f"{name}_ramp" in config[section]]:
        ramp, allowed = config[section][f"{name}_ramp"], ranges.TABLE[name]
        fits = len(ramp) == 3 and all(map(allowed.accepts, ramp[:2])) and count().accepts(ramp[2])
        if ramp and not fits:
            yield (
                f"{section}.{name}_ramp is {ramp}; allowed: (), or (from, to, steps) with numbers "
                f"{allowed.words}, and steps a whole number above 0"
            )


def source_conflicts(config: ConfigDict) -> Iterator[str]:
    """What is said of an image set, but has no meaning for the one that is named."""
    data = config.data
    for name, of in (
        ("side", IMAGE_SETS),
        ("test_share", ("npz:", "images:")),
        ("block_examples", STREAMED),
    ):
        if data.get(name) and not data.source.startswith(of):
            yield (
                f"data.{name} is {data[name]}; allowed: 0 for {data.source}, as it is of "
                f"{', '.join(of)} sources alone"
            )


def report_conflicts(config: ConfigDict, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Epochs, by dotted names, that are no multiple of the epochs between two reports."""
    fields = flat(config.to_dict())
    for epochs, every in pairs:
        if fields[epochs] % fields[every]:
            yield f"{epochs} is {fields[epochs]}; allowed: multiples of {every}, {fields[every]}"


def no_jitter(config: ConfigDict, sections: Sequence[str]) -> Iterator[str]:
    """Sections of nets that learn from stored soft targets, and yet have jitter."""
    for section in sections:
        if config[section].jitter:
            yield (
                f"{section}.jitter is {config[section].jitter}; allowed: 0, because stored soft targets "
                "are of images that are not moved"
            )


def member_conflicts(
    config: ConfigDict, name: str, count: int, at_once: int | None = None
) -> Iterator[str]:
    """Nets that are trained together, so many at once, and don't divide over the mesh's "member"."""
    parts = max(config.mesh.member, 1)  # -1: what is left is known when the devices are
    groups = {min(at_once or count, count), count % (at_once or count)}
    if any(size % parts for size in groups):
        at_a_time = f", trained {at_once} at a time," if at_once else ""
        yield f"{name}: {count} nets{at_a_time} don't divide over mesh.member, {parts}"


def layer_conflicts(config: ConfigDict, name: str, hidden: Sequence[int]) -> Iterator[str]:
    """Every second hidden layer, counted from the last but one, that can't be split over "model"."""
    parts = max(config.mesh.model, 1)
    if any(units % parts for units in hidden[-2::-2]):
        yield f"{name} is {hidden}; its layers don't divide over mesh.model, {parts}"


def _mesh_conflicts(config: ConfigDict) -> Iterator[str]:
    sizes = config.mesh.to_dict()
    if list(sizes.values()).count(-1) > 1:
        yield f"mesh is {sizes}; allowed: one size of -1, which takes what the others leave"


def _micro_batch_conflicts(config: ConfigDict) -> Iterator[str]:
    for name, section in config.items():
        parts = section.get("micro_batches", 1) if isinstance(section, ConfigDict) else 1
        if parts > 1 and section.batch_size % parts:
            size = section.batch_size
            yield f"{name}.micro_batches is {parts}; allowed: divisors of batch_size, {size}"


@functools.cache
def _config_module(study: str) -> ModuleType:
    """The config.py beside a study such as "experiments.mnist.study"."""
    package, _, last = study.rpartition(".")
    if package and last == "study":
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"{package}.config")
    raise UserError(
        f"--config.study is {study!r}; allowed: a module such as 'experiments.mnist.study', with its "
        "config.py beside it"
    )


@functools.cache
def _fields(study: ModuleType) -> frozenset[str]:
    """The dotted names of a study's fields."""
    return frozenset(flat(study.get_config().to_dict()))
