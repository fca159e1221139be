"""Runs a study from a config.

    python -m launch.main --config=experiments/mnist/config.py:default --workdir=runs/mnist

Any field of the config can be set: --config.distilled.temperature=8. The same command again goes on
where the last one stopped, or finishes at once.
"""

import importlib
import logging as std_logging
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from distill_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The study's config file and, after a colon, its preset.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results, checkpoints and the report go.", required=True
)
_STAGES = flags.DEFINE_list("stages", [], "Stages to run, by comma; all if not given.")
_REUSE = flags.DEFINE_list(
    "reuse", [], "Other workdirs; finished stages of an equal config are taken over from them."
)


def main(argv: Sequence[str]) -> None:
    """Runs the study that the config names."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
    study = importlib.import_module(_CONFIG.value.study)
    try:
        study.run(
            _CONFIG.value, Path(_WORKDIR.value), _STAGES.value, [Path(p) for p in _REUSE.value]
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
