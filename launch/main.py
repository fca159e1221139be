"""Runs a study from a config.

    python -m launch.main --config=experiments/mnist/config.py:default --workdir=runs/mnist

Any field of the config can be set: --config.distilled.temperature=8. The same command again goes on
where the last one stopped, or finishes at once. Compiled programs are kept in ~/.cache/distill_jax, or
in JAX_COMPILATION_CACHE_DIR.
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import command

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results, checkpoints and the report go.", required=True
)
_STAGES = flags.DEFINE_list("stages", [], "Stages to run, by comma; all if not given.")
_REUSE = flags.DEFINE_list(
    "reuse", [], "Other workdirs; finished stages of an equal config are taken over from them."
)


def main(argv: Sequence[str]) -> None:
    """Runs the study that the config names."""
    # Nets of one shape share their programs, over stages, resumptions and the points of a sweep.
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "distill_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    study = importlib.import_module(_CONFIG.value.study)
    reuse = [Path(directory) for directory in _REUSE.value]
    study.run(_CONFIG.value, Path(_WORKDIR.value), _STAGES.value, reuse)


if __name__ == "__main__":
    command.run(main)
