"""Section 3 of the paper on MNIST: presets and sweeps.

    python -m launch.main --config=experiments/mnist/config.py:default --workdir=runs/mnist

`smoke` takes about a minute and shows that everything works; `default` about 15 minutes on two CPU
cores, one seed; `full`, three seeds and some hours on two cores, is what is published; `paper` is sized
for one accelerator: 5 seeds, the whole grid. Any field can be set: --config.distilled.temperature=8
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from distill_jax.ranges import between, count, several
from experiments.common.config import (
    SEEDS,
    WEIGHTS,
    Overrides,
    layer_conflicts,
    member_conflicts,
    net_section,
    no_jitter,
    product,
    ramp_conflicts,
    report_conflicts,
    source_conflicts,
)

PRESETS = ("smoke", "default", "full", "paper")
_NETS = (
    "teacher",
    "baseline",
    "distilled",
    "objectives",
    "sweep",
    "omissions",
    "fractions",
    "unlabelled",
    "shifts",
    "moved_omissions",
    "distorted",
)
_SMALL = 0.3
"""The scale of first weights where students are trained for long on images that are not moved."""
TEMPERATURES = (1.0, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 32.0)  # section 3's range


def get_config(preset: str = "default") -> ConfigDict:
    """The config of a preset: smoke, default, full or paper."""
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict()
    config.study = "experiments.mnist.study"
    config.preset = preset
    config.seeds = (0,)  # one net of each kind per seed, trained as one vmapped program
    config.selection = "last"  # epoch; or "validation": the checkpoint with fewest errors there
    config.mesh = {"member": 1, "data": -1, "model": 1}
    config.data = {
        "source": "embedded",  # or npz:FILE, idx:FOLDER, images:FOLDER, tfds:NAME
        "data_dir": "",  # of TFDS, or of other files like the embedded ones
        "side": 0,  # pixels; above 0: images are resized; not of the embedded ones
        "test_share": 0.0,  # of each class, where npz: or images: has no test set
        # 0: the training set is resident. Else, of an images: or tfds: source, the stages teacher,
        # soft_targets, baseline, distilled and objectives read it from disk, in blocks of at most
        # so many examples. Their order is another one, so the numbers aren't those of a resident run.
        # The other stages cut the set up, and hold it in memory.
        "block_examples": 0,
        "train_examples": 0,  # 0: all
        "test_examples": 0,
        "validation": 0,  # examples held out of training; the paper trains on all 60,000
        # Of the examples held out for validation and test, of partial transfer sets and of a stream's
        # order.
        "seed": 0,
    }
    config.teacher = net_section(
        hidden=(1200, 1200),
        input_dropout=0.1,
        hidden_dropout=0.3,
        max_norm=2.5,
        jitter=2,
        learning_rate=2e-3,
        epochs=36,
    )
    student = {
        **net_section(hidden=(800, 800), learning_rate=2e-3, epochs=16),
        # Of the first weights, He's at 1. From small ones a student of images that are not moved
        # generalises better, if it is trained for long enough: it learns slowly at first.
        "init_scale": 1.0,
    }
    config.baseline = net_section(hidden=(800, 800), learning_rate=1e-3, batch_size=256, epochs=15)
    config.distilled = {
        **student,
        "init_scale": _SMALL,
        "epochs": 20,
        "temperature": 20.0,
        "hard_weight": 0.02,
        # Of the stage distilled alone: (from, to, steps), a number that changes with the step; (): none.
        "temperature_ramp": (),
        "hard_weight_ramp": (),
    }
    config.objectives = {**student, "epochs": 3, "temperature": 20.0, "hard_weight": 0.02}
    config.sweep = {
        **student,
        "widths": (300, 30),
        "times": (1, 1),  # the epochs, for each width: a small net is cheap to train for long
        "temperatures": (1.0, 2.5, 4.0, 8.0, 20.0),
        "hard_weight": 0.0,
    }
    config.omissions = {
        **student,
        "init_scale": _SMALL,
        "temperature": 20.0,
        "hard_weight": 0.0,
        "only_7_8_epochs": 45,  # a fifth of the examples
    }
    config.fractions = {
        **student,
        "temperature": 20.0,
        "percentages": (100.0, 30.0, 10.0, 3.0, 1.0),
        "epochs": 3,  # of the full set; a smaller one is passed over more often, for as many steps
    }
    config.unlabelled = {
        **student,
        "temperature": 20.0,
        "hard_weight": 0.02,
        "epochs": 12,
        "teacher_epochs": 16,
        "labels_known": 0.1,
    }
    config.shifts = {  # students of shifted images, with the teacher's logits of the same shift
        **student,
        "pixels": 2,
        "temperature": 4.0,
        "hard_weight": 0.0,
        "epochs": 6,
    }
    config.moved_omissions = {  # the same for the transfer sets without some digits
        **student,
        "temperature": 20.0,
        "hard_weight": 0.0,
        "epochs": 6,
        "only_7_8_epochs": 20,
    }
    config.distorted = {  # nets on labels of distorted images; students of their ensemble
        **student,
        "members": (0, 1),  # seeds
        "epochs": 8,
        "views": 8,  # of each image, with the ensemble's logits
        "temperature": 4.0,
        "hard_weight": 0.0,
        "student_epochs": 6,
    }
    return {"smoke": _smoke, "default": lambda c: c, "full": _full, "paper": _paper}[preset](config)


ALLOWED = {
    "data.block_examples": count(0),
    "data.validation": count(0),
    "sweep.widths": several(count(), distinct=True),
    "sweep.times": several(count()),
    "sweep.temperatures": WEIGHTS,
    "omissions.only_7_8_epochs": count(),
    "moved_omissions.only_7_8_epochs": count(),
    "fractions.percentages": several(between(1e-3, 100), distinct=True),
    "unlabelled.teacher_epochs": count(),
    "unlabelled.labels_known": between(1e-3, 1),
    "shifts.pixels": count(),
    "distorted.members": SEEDS,
    "distorted.views": count(),
    "distorted.student_epochs": count(),
}
"""What the fields may be that only this study has."""


def conflicts(config: ConfigDict) -> Iterator[str]:
    """Values that don't fit each other."""
    yield from report_conflicts(
        config,
        [
            *((f"{net}.epochs", f"{net}.report_every") for net in _NETS),
            ("omissions.only_7_8_epochs", "omissions.report_every"),
            ("moved_omissions.only_7_8_epochs", "moved_omissions.report_every"),
            ("distorted.student_epochs", "distorted.report_every"),
            ("unlabelled.teacher_epochs", "teacher.report_every"),
        ],
    )
    yield from no_jitter(config, _NETS[2:])
    if len(config.sweep.times) != len(config.sweep.widths):
        yield f"sweep.times is {config.sweep.times}; allowed: one for each of {config.sweep.widths}"
    yield from ramp_conflicts(config, "distilled")
    yield from member_conflicts(config, "seeds", len(config.seeds))
    yield from member_conflicts(config, "distorted.members", len(config.distorted.members))
    for net in _NETS:
        if net != "sweep":
            yield from layer_conflicts(config, f"{net}.hidden", config[net].hidden)
    for width in config.sweep.widths:
        yield from layer_conflicts(config, "sweep.widths", (width, width))
    data = config.data
    if config.selection == "validation" and not data.validation:
        yield "selection is 'validation', but data.validation is 0: hold some examples out"
    yield from source_conflicts(config)
    if data.data_dir and not data.source.startswith(("embedded", "tfds:")):
        yield f"data.data_dir is {data.data_dir!r}; allowed: '' for {data.source}"
    for net in _NETS[:4]:
        if 0 < data.block_examples < config[net].batch_size:
            yield f"{net}.batch_size is {config[net].batch_size}, more than data.block_examples"
    size = data.train_examples or (60_000 if data.source == "embedded" else 0)
    if size:
        yield from size_conflicts(config, size)


def size_conflicts(config: ConfigDict, size: int) -> Iterator[str]:
    """What doesn't fit a training set of that size; which of some nets is one half of it."""
    validation = config.data.validation
    if size - validation < 2:
        yield f"data.validation is {validation} of {size} training examples"
    size -= validation
    for net in _NETS:
        examples = size // 2 if net == "unlabelled" else size
        batch_size = config[net].batch_size
        if net != "fractions" and batch_size > examples:
            yield f"{net}.batch_size is {batch_size}, but it is trained on {examples} examples"


def sweep(name: str) -> list[Overrides]:
    """The named sweeps of `python -m launch.sweep`."""
    sweeps = {
        "temperature": product({"distilled.temperature": list(TEMPERATURES)}),
        "hard_weight": product({"distilled.hard_weight": [0.0, 0.05, 0.1, 0.2, 0.5]}),
        "jitter_and_dropout": product(
            {"teacher.jitter": [0, 2], "teacher.hidden_dropout": [0.0, 0.3, 0.5]}
        ),
    }
    if name not in sweeps:
        raise ValueError(f"no sweep {name!r}; there are {', '.join(sweeps)}")
    return sweeps[name]


def _smoke(config: ConfigDict) -> ConfigDict:
    """The same code on a part of the data, in seconds."""
    small = {"hidden": (128, 128), "batch_size": 100, "init_scale": 1.0}
    config.data.update(train_examples=4000, test_examples=2000)
    config.teacher.update(hidden=(256, 256), batch_size=100, epochs=16)
    config.baseline.update(hidden=(128, 128), batch_size=100, epochs=8)
    config.distilled.update(small, epochs=16)
    config.objectives.update(small, epochs=8)
    config.sweep.update(small, epochs=8, widths=(128, 30), temperatures=(1.0, 20.0))
    config.omissions.update(small, epochs=16, only_7_8_epochs=40)
    config.fractions.update(small, epochs=8, percentages=(100.0, 3.0))
    config.unlabelled.update(small, epochs=12, teacher_epochs=12)
    config.shifts.update(small, pixels=1, epochs=12)
    config.moved_omissions.update(small, epochs=12, only_7_8_epochs=24)
    config.distorted.update(small, epochs=8, views=4, student_epochs=8)
    return config


def _full(config: ConfigDict) -> ConfigDict:
    """What is published: three seeds, some hours on two CPU cores."""
    config.seeds = (0, 1, 2)
    config.teacher.update(max_norm=3.0, epochs=200, report_every=2)
    config.baseline.update(epochs=20)
    config.distilled.update(epochs=100)
    config.objectives.update(init_scale=_SMALL, epochs=15)
    config.sweep.update(
        epochs=12, widths=(800, 300, 30), times=(1, 2, 10), temperatures=TEMPERATURES
    )
    config.omissions.update(epochs=100, only_7_8_epochs=300)
    config.fractions.update(epochs=8)
    config.unlabelled.update(init_scale=_SMALL, epochs=40, teacher_epochs=80)
    config.shifts.update(epochs=100)
    config.moved_omissions.update(epochs=100, only_7_8_epochs=200)
    config.distorted.update(members=(0, 1, 2), epochs=150, views=32, student_epochs=60)
    return config


def _paper(config: ConfigDict) -> ConfigDict:
    """The paper's sizes; its text gives no epochs or learning rates, so these are ours."""
    student = {
        "learning_rate": 1e-3,
        "batch_size": 256,
        "report_every": 5,
        "init_scale": _SMALL,
    }
    config.seeds = (0, 1, 2, 3, 4)
    config.teacher.update(
        input_dropout=0.2,
        hidden_dropout=0.5,
        max_norm=3.5,
        learning_rate=1e-3,
        batch_size=256,
        epochs=1000,
        report_every=5,
    )
    config.baseline.update(learning_rate=5e-4, batch_size=256, epochs=20)
    config.distilled.update(student, epochs=500)
    config.objectives.update(student, epochs=100)
    config.sweep.update(
        student, epochs=100, widths=(800, 300, 30), times=(1, 1, 1), temperatures=TEMPERATURES
    )
    config.omissions.update(student, epochs=100, only_7_8_epochs=500)
    config.fractions.update(student, epochs=50)
    config.unlabelled.update(student, epochs=500, teacher_epochs=1000)
    config.shifts.update(student, epochs=500)
    config.moved_omissions.update(student, epochs=500, only_7_8_epochs=1000)
    config.distorted.update(
        student, members=(0, 1, 2, 3, 4), epochs=1000, views=100, student_epochs=500
    )
    return config
