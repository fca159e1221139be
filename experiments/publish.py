"""Makes a finished run of preset `full` the published one: its rows, its curves, its first nets.

    python -m experiments.publish runs/mnist-full --device="2 cores of an AMD EPYC"

Writes reference.json, history.json, published/ and the figures of its README into the study's folder,
for `python -m experiments.check_published`.
"""

import importlib
from pathlib import Path

from absl import flags

from distill_jax import command, files
from distill_jax.errors import UserError
from experiments.common import extras, published

_DEVICE = flags.DEFINE_string("device", None, "What it ran on, in words.", required=True)


def main(workdir: str) -> None:
    """Copies what is published, and prints where it is."""
    path = files.local_path(workdir)
    config = files.read_json(path / "config.json")
    if config["preset"] != published.PRESET:
        raise UserError(f"{path} is of preset {config['preset']}; published is {published.PRESET}")
    module = extras.import_study(config["study"])
    study = Path(str(module.__file__)).parent
    published.publish(path, study, module.STUDY.published, _DEVICE.value)
    figures = importlib.import_module(f"{module.__package__}.figures")
    published.draw(study, figures.published_figures)
    size = sum(file.stat().st_size for file in study.glob("published/*/*"))
    print(f"{study}: reference.json, history.json and {size / 1e6:.1f} MB of nets")


if __name__ == "__main__":
    command.run(main, "WORKDIR")
