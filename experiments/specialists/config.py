"""Sections 5, 6.1 and 8 of the paper on a thousand Han characters: presets and sweeps.

    python -m launch.main --config=experiments/specialists/config.py:default --workdir=runs/specialists

`smoke` takes a minute and shows that everything works; `default` under 20 minutes on two CPU cores, on
the glyphs that are in the project; `full`, about two hours there, has five seeds and all
comparisons; `paper` has the paper's 61 specialists of 300 classes, for an accelerator and a set of
2,965 characters (python -m experiments.specialists.prepare --characters=2965): --config.data.source=DIR.
Any field can be set: --config.data.difficulty=1.5
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from distill_jax.ranges import above, at_least, count, flag, number, one_of, several
from experiments.common.config import (
    Overrides,
    layer_conflicts,
    member_conflicts,
    net_section,
    product,
    report_conflicts,
    source_conflicts,
    zipped,
)

PRESETS = ("smoke", "default", "full", "paper")
_TRAINED = ("generalist", "specialists", "controls", "soft", "mixture", "distilled")
_HEADS = ("unit", "logsumexp", "full_hard", "full_soft")


def get_config(preset: str = "default") -> ConfigDict:
    """The config of a preset: smoke, default, full or paper."""
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict()
    config.study = "experiments.specialists.study"
    config.preset = preset
    config.seeds = (0, 1, 2)  # a generalist each, with specialists of its own
    config.selection = "last"  # epoch; or "validation": the checkpoint with fewest errors there
    config.mesh = {"member": 1, "data": -1, "model": 1}
    config.data = {
        # Or a folder made by experiments.specialists.prepare, or npz:FILE, idx:FOLDER, images:FOLDER,
        # tfds:NAME.
        "source": "embedded",
        "data_dir": "",  # of TFDS
        "side": 0,  # pixels; above 0: images are resized; not glyphs
        "test_share": 0.0,  # of each class, where npz: or images: has no test set
        "classes": 0,  # the first so many; 0: all
        "views": 6,  # distorted views of each training example
        "difficulty": 1.7,  # of the distortion; 0 (with one view): none
        "validation": 0.1,  # of an image set's training examples; glyphs have typefaces for it
        "seed": 0,
    }
    config.generalist = {
        **net_section(
            hidden=(32,),
            learning_rate=2e-3,
            batch_size=256,
            epochs=10,
            report_every=2,
            save_every=1,
        ),
        "at_once": 1,  # seeds trained as one program; on a CPU one after another is faster
        "channels": (32, 64),
        "strides": (4, 2),
        "activation": "gelu",  # or relu
        "output_scale": 0.15,  # of the first output weights
    }
    config.clusters = {
        "method": "kmeans",  # or greedy: sets grow from pairs of classes that are confused
        "both_methods": False,  # True: specialists by the other method too, to compare
        "count": 20,  # specialists
        "size": 100,  # classes of each; sets may overlap
        "partition": False,  # True: every class in exactly one set, of whatever size
        "temperature": 2.0,  # of the predictions whose covariance is clustered
        "examples": 30_000,  # of the training set; 0: all
        "epochs": 15,  # of K-means
    }
    config.specialists = {
        "kind": "logsumexp",  # head: see distill_jax.specialists.heads
        "examples": 0,  # of the training set, at random; 0: all
        "frozen_trunk": True,  # the convolutions stay the generalist's, and run once for all
        "active_by": 2,  # of the generalist's most probable classes (n, in the paper 1)
        "learning_rate": 5e-3,
        "batch_size": 256,
        "epochs": 4,  # passes over the special examples
        "report_every": 4,
        "save_every": 1,
        "warmup_epochs": 0,
        "at_once": 5,  # trained as one program
    }
    # Of a generalist, that take as long as its specialists.
    config.controls = {"epochs": 4, "report_every": 4}
    config.soft = {
        "kinds": ("unit", "logsumexp", "full_hard", "full_soft"),
        "count": 3,  # specialists of each seed
        "epochs": 6,
        "report_every": 1,
        "temperature": 2.0,
        "examples": 0,  # of those that specialists are trained on; 0: all
        "evaluated": 4000,  # examples of a set, while they learn; 0: all
    }
    config.mixture = {  # of as many experts as there are specialists, with a learned gate
        "epochs": 0,  # from the generalist; 0: none
        "scratch_epochs": 0,  # 0: none
        "report_every": 1,
        "learning_rate": 5e-3,
        "batch_size": 256,
        "warmup_epochs": 0,
    }
    config.distilled = {  # from the generalist
        # Where these are the controls', at the generalist's rate, on all examples, their net is the
        # control on labels.
        "epochs": 4,
        "examples": 0,  # of those that specialists are trained on; 0: all
        "k": 64,  # largest probabilities kept of each example
        "hard_weight": 0.8,
        "learning_rate": 2e-3,
        "report_every": 4,
        "scratch_epochs": 4,
    }
    config.inference = {"examples": 256, "max_passes": 1000}
    changed = {"smoke": _smoke, "default": lambda c: c, "full": _full, "paper": _paper}
    return changed[preset](config)


_KIND = one_of(*_HEADS)
ALLOWED = {
    "data.classes": count(0),
    "data.views": count(),
    "data.difficulty": at_least(0),
    "data.validation": number("above 0, and less than 1", lambda share: 0 < share < 1),
    "generalist.channels": several(count()),
    "generalist.strides": several(count()),
    "generalist.activation": one_of("gelu", "relu"),
    "generalist.output_scale": above(0),
    "clusters.method": one_of("kmeans", "greedy"),
    "clusters.both_methods": flag(),
    "clusters.count": count(),
    "clusters.size": count(),
    "clusters.partition": flag(),
    "clusters.examples": count(0),
    "specialists.kind": _KIND,
    "specialists.examples": count(0),
    "specialists.frozen_trunk": flag(),
    "specialists.active_by": count(),
    "soft.kinds": several(_KIND, distinct=True),
    "soft.count": count(),
    "soft.examples": count(0),
    "soft.evaluated": count(0),
    "mixture.epochs": count(0),
    "mixture.scratch_epochs": count(0),
    "distilled.examples": count(0),
    "distilled.scratch_epochs": count(),
    "inference.examples": count(),
    "inference.max_passes": count(),
}
"""What the fields may be that only this study has."""


def conflicts(config: ConfigDict) -> Iterator[str]:
    """Values that don't fit each other."""
    yield from report_conflicts(
        config,
        [
            *((f"{net}.epochs", f"{net}.report_every") for net in _TRAINED),
            ("mixture.scratch_epochs", "mixture.report_every"),
            ("distilled.scratch_epochs", "distilled.report_every"),
        ],
    )
    at_once = config.generalist.at_once
    yield from member_conflicts(config, "seeds", len(config.seeds), at_once)
    at_once = config.specialists.at_once
    yield from member_conflicts(config, "clusters.count", config.clusters.count, at_once)
    yield from member_conflicts(config, "soft.count", config.soft.count)
    yield from layer_conflicts(config, "generalist.hidden", config.generalist.hidden)
    net, data, clusters = config.generalist, config.data, config.clusters
    yield from source_conflicts(config)
    if data.data_dir and not data.source.startswith("tfds:"):
        yield f"data.data_dir is {data.data_dir!r}; allowed: '' for all but tfds: sources"
    if data.difficulty == 0 and data.views > 1:
        yield f"data.views is {data.views}; allowed: 1, as at data.difficulty 0 all are the same"
    if len(net.channels) != len(net.strides):
        yield f"generalist.strides is {net.strides}; allowed: one for each of channels, {net.channels}"
    if net.jitter:
        yield f"generalist.jitter is {net.jitter}; allowed: 0, as views move images: data.difficulty"
    if net.input_dropout:
        yield "generalist.input_dropout is not 0, but its inputs are convolved: use hidden_dropout"
    if data.classes or data.source == "embedded":
        yield from class_conflicts(config, data.classes or 1000)
    if config.specialists.batch_size % 2:
        yield (
            f"specialists.batch_size is {config.specialists.batch_size}; allowed: even numbers, as half "
            "of a batch is of a specialist's classes"
        )
    if clusters.partition and clusters.method != "kmeans":
        yield f"clusters.partition is True; allowed: False for clusters.method {clusters.method}"
    if config.soft.count > clusters.count:
        yield f"soft.count is {config.soft.count}; allowed: up to clusters.count, {clusters.count}"


def class_conflicts(config: ConfigDict, classes: int) -> Iterator[str]:
    """More clusters, larger ones or more probable classes than there are classes."""
    clusters = config.clusters
    for name, value, most in (
        ("clusters.count", clusters.count, classes),
        ("clusters.size", 1 if clusters.partition else clusters.size, classes - 1),
        ("specialists.active_by", config.specialists.active_by, classes),
    ):
        if value > most:
            yield f"{name} is {value}; allowed: up to {most}, as there are {classes} classes"


def sweep(name: str) -> list[Overrides]:
    """The named sweeps of `python -m launch.sweep`."""
    sweeps = {
        "size": product({"clusters.size": [50, 75, 100, 150]}),
        "count": product({"clusters.count": [10, 20, 30, 40]}),
        "temperature": product({"clusters.temperature": [1.0, 2.0, 4.0]}),
        "epochs": zipped(
            {"specialists.epochs": [1, 2, 3, 6], "specialists.report_every": [1, 2, 3, 6]}
        ),
        "learning_rate": product({"specialists.learning_rate": [1e-3, 3e-3, 5e-3]}),
        "kind": product({"specialists.kind": ["unit", "logsumexp", "full_hard", "full_soft"]}),
        "active_by": product({"specialists.active_by": [1, 2, 3]}),
        "method": product({"clusters.method": ["kmeans", "greedy"]}),
    }
    if name not in sweeps:
        raise ValueError(f"no sweep {name!r}; there are {', '.join(sweeps)}")
    return sweeps[name]


def _smoke(config: ConfigDict) -> ConfigDict:
    """The same code on a part of the data, in seconds."""
    config.seeds = (0, 1)
    config.data.update(classes=60, views=2, difficulty=1.0)
    config.generalist.update(hidden=(24,), channels=(8, 16), batch_size=64, epochs=6)
    config.clusters.update(count=4, size=20, examples=2000, both_methods=True)
    config.specialists.update(examples=0, epochs=2, report_every=2, batch_size=64, at_once=4)
    config.controls.update(epochs=2, report_every=2)
    config.soft.update(count=2, epochs=4, report_every=2, evaluated=500)
    config.mixture.update(epochs=1, batch_size=64)
    config.distilled.update(examples=3000, k=16, epochs=2, report_every=2, scratch_epochs=4)
    config.inference.update(examples=32, max_passes=300)
    return config


def _full(config: ConfigDict) -> ConfigDict:
    """Five generalists that are done learning, and all comparisons."""
    config.seeds = (0, 1, 2, 3, 4)
    config.data.difficulty = 1.8
    config.generalist.epochs = 30
    config.clusters.update(method="greedy", both_methods=True)
    config.mixture.update(epochs=1, scratch_epochs=4)
    config.soft.update(epochs=40, report_every=2, examples=50_000)
    config.distilled.update(epochs=12, learning_rate=5e-3)
    return config


def _paper(config: ConfigDict) -> ConfigDict:
    """The paper's 61 specialists of 300 classes; epochs and rates are ours."""
    config.data.update(views=20)
    config.generalist.update(
        hidden=(512,),
        channels=(64, 256, 512),
        strides=(2, 2, 2),
        at_once=3,
        dtype="bfloat16",
        batch_size=1024,
        epochs=30,
        report_every=5,
    )
    config.clusters.update(count=61, size=300, examples=200_000)
    config.specialists.update(
        examples=0, frozen_trunk=False, learning_rate=5e-4, batch_size=512, at_once=4
    )
    config.controls.update(epochs=5, report_every=5)
    config.soft.count = 61
    config.distilled.update(epochs=5, report_every=5, scratch_epochs=40)
    config.inference.update(examples=1024, max_passes=5000)
    return config
