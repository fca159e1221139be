"""A data set, a teacher and a student of your own: presets `smoke`, under a minute, and `default`.

    python -m launch.main --config=experiments/custom/config.py:default --workdir=runs/custom \\
        --config.data.source=images:FOLDER --config.data.test_share=0.2
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from distill_jax.ranges import count, one_of, several
from experiments.common.config import net_section, no_jitter, source_conflicts

PRESETS = ("smoke", "default")


def get_config(preset: str = "default") -> ConfigDict:
    """The config of a preset: smoke or default."""
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"study": "experiments.custom.study", "preset": preset})
    config.update(seeds=(0,), selection="last")  # a student for each seed; the first one's teacher
    config.mesh = {"member": 1, "data": -1, "model": 1}
    config.data = {"source": "embedded", "data_dir": "", "side": 0, "test_share": 0.0, "seed": 0}
    config.data.update(train_examples=0, test_examples=0)  # 0: all
    config.teacher = net_section(learning_rate=1e-2, batch_size=128, epochs=30)
    config.teacher.update(depth=20, width=16)
    config.student = net_section(hidden=(256, 256), learning_rate=3e-3, batch_size=128, epochs=60)
    config.student.update(temperature=2.0, hard_weight=0.5)
    config.views = {"shift": 2}  # pixels; teacher and student see the same moved images
    config.export = {"formats": ("stablehlo",)}  # or onnx and safetensors, of the extra `export`
    if preset == "smoke":
        config.data.update(train_examples=2000, test_examples=1000)
        config.teacher.update(epochs=10, depth=8, width=8, batch_size=50)
        config.student.update(hidden=(64,), epochs=40, batch_size=50)
        config.views.update(shift=1)
    return config


ALLOWED = {
    "teacher.depth": one_of(*range(8, 111, 6)),
    "teacher.width": count(),
    "views.shift": count(0),
    "export.formats": several(one_of("stablehlo", "onnx", "safetensors")),
}
"""What the fields may be that only this study has."""


def conflicts(config: ConfigDict) -> Iterator[str]:
    """Values that don't fit each other."""
    yield from no_jitter(config, ("teacher", "student"))
    yield from source_conflicts(config)
