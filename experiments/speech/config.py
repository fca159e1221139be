"""Sections 4 and 6 of the paper on recorded speech: presets and sweeps.

    python -m launch.main --config=experiments/speech/config.py:default --workdir=runs/speech

`smoke` takes a minute and shows that everything works; `default` under 20 minutes on two CPU cores, on
the recordings that are in the project; `full` is what is published, hours on two CPU cores, on the whole
corpus, which is prepared once:

    python -m experiments.speech.prepare --corpus=debian --out=runs/debian

`paper` is the paper's net, 8 layers of 2560, for an accelerator and a prepared corpus:
--config.data.source=DIR. Any field can be set: --config.distilled.temperature=5
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from distill_jax.ranges import between, count, one_of, several
from experiments.common.config import (
    SEED,
    SEEDS,
    WEIGHTS,
    Overrides,
    layer_conflicts,
    member_conflicts,
    net_section,
    no_jitter,
    product,
    report_conflicts,
)

PRESETS = ("smoke", "default", "full", "paper")
_MOST_DRAWS = 2**15  # soft_targets.encodings.MAX_DRAWS
_NETS = ("ensemble", "distilled", "fractions", "compression", "unlabelled")


def get_config(preset: str = "default") -> ConfigDict:
    """The config of a preset: smoke, default, full or paper."""
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict()
    config.study = "experiments.speech.study"
    config.preset = preset
    config.seeds = (0, 1, 2)  # of the students
    config.selection = "last"  # epoch; or "validation": the checkpoint with fewest errors there
    config.mesh = {"member": 1, "data": -1, "model": 1}
    config.data = {
        "source": "embedded",  # or a folder made by python -m experiments.speech.prepare
        "train_frames": 0,  # 0: all
        "validation_frames": 0,
        "test_frames": 0,
        "min_frames": 300,  # a state with fewer in training is tied to its phone's; 0: none is
        "block_frames": 0,  # above 0: training is streamed from disk, so many frames at a time
        "stream_seed": 0,  # of the order in which utterances are dealt to blocks
    }
    net = net_section(
        hidden=(256, 256, 256),
        learning_rate=2e-3,
        warmup_epochs=0,
        batch_size=256,
        epochs=3,
        save_every=1,
    )
    config.ensemble = {
        **net,
        "report_every": 3,
        "members": tuple(range(10)),  # seeds: nothing else differs
        "at_once": 1,  # members trained as one vmapped program
    }
    config.soft_targets = {
        "mean": "arithmetic",  # or geometric
        "encoding": "top_k",  # the k largest probabilities of a frame; or "sampled": k states drawn
        "k": 64,
        "temperatures": (1.0, 2.0, 5.0, 10.0),
        "shard_rows": 65536,
    }
    config.distilled = {**net, "epochs": 4, "temperature": 2.0, "hard_weight": 0.5}
    config.fractions = {
        **net,
        "percent": 3.0,
        "temperature": 2.0,
        "hard_weight": 0.0,
        "epochs": 16,  # of the part
        "report_every": 2,
    }
    config.compression = {
        **net,
        "percent": 4.0,
        "k": (8, 16, 64, 256),  # largest; and draws of as many bytes as each
        "temperature": 2.0,
        "hard_weight": 0.5,
        "epochs": 6,
        "report_every": 6,
    }
    config.unlabelled = {
        **net,
        "hidden": (64, 64),
        "hard_weight": 0.5,
        "temperature": 2.0,
        "seeds": 1,  # how many of the seeds
    }
    config.temperature = {
        "seeds": 1,  # how many of the seeds, at temperatures other than Table 1's
        "epochs": 0,  # of the students at every temperature; 0: as many as Table 1's
    }
    config.decoding = {
        "words": 500,  # of the test set, at most
        "tuning_words": 200,  # of the validation set
        "members": 3,  # of the ensemble, decoded one by one for the baseline
    }
    presets = {"smoke": _smoke, "default": lambda c: c, "full": _full, "paper": _paper}
    return presets[preset](config)


_PERCENT = between(1e-3, 100)
ALLOWED = {
    "data.train_frames": count(0),
    "data.validation_frames": count(0),
    "data.test_frames": count(0),
    "data.min_frames": count(0),
    "data.block_frames": count(0),
    "data.stream_seed": SEED,
    "ensemble.members": SEEDS,
    "soft_targets.encoding": one_of("top_k", "sampled"),
    "soft_targets.temperatures": WEIGHTS,
    "soft_targets.shard_rows": count(),
    "fractions.percent": _PERCENT,
    "compression.percent": _PERCENT,
    "compression.k": several(count(), distinct=True),
    "unlabelled.seeds": count(),
    "temperature.seeds": count(),
    "temperature.epochs": count(0),
    "decoding.words": count(0),
    "decoding.tuning_words": count(0),
    "decoding.members": count(),
}
"""What the fields may be that only this study has."""


def conflicts(config: ConfigDict) -> Iterator[str]:
    """Values that don't fit each other."""
    reports = [(f"{net}.epochs", f"{net}.report_every") for net in _NETS]
    reports.append(("temperature.epochs", "distilled.report_every"))
    yield from report_conflicts(config, reports)
    yield from no_jitter(config, _NETS[1:])
    made_at = config.soft_targets.temperatures
    for net in ("distilled", "fractions"):
        if config[net].temperature not in made_at:
            yield (
                f"{net}.temperature is {config[net].temperature}; allowed: one of "
                f"soft_targets.temperatures, {', '.join(map(str, made_at))}"
            )
    frames = config.data.train_frames
    if frames and not config.data.block_frames:
        for net in _NETS:
            size, most = (
                config[net].batch_size,
                round(frames * config[net].get("percent", 100) / 100),
            )
            if size > most:
                yield f"{net}.batch_size is {size}; its training set has at most {most}"
    for section in ("temperature", "unlabelled"):
        if config[section].seeds > len(config.seeds):
            yield f"{section}.seeds is {config[section].seeds}; there are {len(config.seeds)} seeds"
    members = len(config.ensemble.members)
    yield from member_conflicts(config, "seeds", len(config.seeds))
    yield from member_conflicts(config, "ensemble.members", members, config.ensemble.at_once)
    for net in _NETS:
        yield from layer_conflicts(config, f"{net}.hidden", config[net].hidden)
    kept = config.soft_targets
    if kept.encoding == "sampled" and kept.k > _MOST_DRAWS:
        yield f"soft_targets.k is {kept.k}; allowed: up to {_MOST_DRAWS} draws"
    if config.decoding.members > members:
        yield f"decoding.members is {config.decoding.members}; the ensemble has {members}"


def sweep(name: str) -> list[Overrides]:
    """The named sweeps of `python -m launch.sweep`."""
    sweeps = {
        "hard_weight": product({"distilled.hard_weight": [0.0, 0.25, 0.5, 0.75]}),
        "k": product({"soft_targets.k": [4, 8, 16, 32, 64]}),
        "mean": product({"soft_targets.mean": ["arithmetic", "geometric"]}),
    }
    if name not in sweeps:
        raise ValueError(f"no sweep {name!r}; there are {', '.join(sweeps)}")
    return sweeps[name]


def _smoke(config: ConfigDict) -> ConfigDict:
    """The same code on a part of the data, in seconds."""
    small = {"hidden": (32, 32), "epochs": 1}
    config.seeds = (0, 1)
    config.data.update(train_frames=30_000, validation_frames=5_000, test_frames=5_000)
    # Trained less, students are below the nets that taught them, as in no study of full length.
    long = {**small, "epochs": 3, "learning_rate": 5e-3}
    config.ensemble.update(long, members=(0, 1, 2), at_once=3, report_every=3)
    config.soft_targets.update(temperatures=(1.0, 2.0), k=8, shard_rows=16384)
    config.distilled.update(long, epochs=6, report_every=6)
    config.fractions.update(small, percent=10.0, epochs=20, batch_size=128, report_every=10)
    config.compression.update(small, k=(8, 16), epochs=1, report_every=1)
    config.unlabelled.update(small, hidden=(16,))
    config.decoding.update(words=20, tuning_words=0, members=1)
    return config


def _full(config: ConfigDict) -> ConfigDict:
    """What is published: the whole corpus, on two CPU cores. README.md says how it was chosen."""
    net = {"hidden": (384, 384, 384), "batch_size": 512}
    config.data.update(source="runs/debian", min_frames=600)
    config.ensemble.update(net, report_every=1)
    config.distilled.update(net, epochs=6, report_every=2)
    config.temperature.update(seeds=3, epochs=2)
    config.fractions.update(hidden=net["hidden"], epochs=24, report_every=6)
    config.compression.update(hidden=net["hidden"], percent=1.2)
    config.unlabelled.update(batch_size=512, epochs=2, report_every=2, seeds=3)
    config.decoding.update(words=0, tuning_words=400)
    return config


def _paper(config: ConfigDict) -> ConfigDict:
    """The paper's sizes: 85M parameters with 14,000 states; epochs and rates are ours."""
    large = {
        "hidden": (2560,) * 8,
        "dtype": "bfloat16",
        "learning_rate": 2e-4,
        "batch_size": 1024,
        "epochs": 10,
        "warmup_epochs": 1,
    }
    config.data.min_frames = 0
    config.ensemble.update(large, report_every=1)
    config.soft_targets.k = 64
    config.distilled.update(large)
    config.fractions.update(large, epochs=100, report_every=5)
    config.compression.update(large, epochs=20, report_every=5, percent=3.0)
    config.unlabelled.update(large, hidden=(512,) * 4)
    config.decoding.update(words=0, tuning_words=2000, members=10)
    return config
