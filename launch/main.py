"""Runs a study from a config.

    python -m launch.main --config=experiments/mnist/config.py:default --workdir=runs/mnist

Any field of the config can be set: --config.distilled.temperature=8. The same command again
resumes where the last one stopped; of a finished study it only writes the report again. Compiled
programs are kept in ~/.cache/distill_jax, or in JAX_COMPILATION_CACHE_DIR.

For a run of several processes start this command once for each, with --distributed and a shared
--workdir. SIGTERM saves and exits with status 75; if a process of the run is lost, the others exit with
status 76. After both the same command resumes the run.
"""

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
    "reuse", [], "Other workdirs; finished stages with the same config are reused."
)
_PART = flags.DEFINE_string(
    "part",
    None,
    "I,N: of the one stage in --stages, train only the groups of nets I, I+N, I+2N and so on; other "
    "processes in the same workdir train the rest. The command without it then finishes the stage.",
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "off",
    "off: a single process. auto: one of several, started by Slurm, Cloud TPU, Kubernetes or Open MPI. "
    "HOST:PORT,COUNT,INDEX: the address of process 0, the number of processes, and this one's index.",
)


def main(argv: Sequence[str]) -> None:
    """Runs the study that the config names."""
    # Nets of equal shape share compiled programs: over stages, resumed runs and points of a sweep.
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "distill_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # JAX reads these settings when it is imported.
    from distill_jax import processes
    from experiments.common import extras, parts

    processes.start(_DISTRIBUTED.value)
    processes.handle_sigterm()
    study = extras.import_study(_CONFIG.value.study)
    if _PART.value is not None:
        part = parts.parse_part(_PART.value)
        parts.run_part(_CONFIG.value, Path(_WORKDIR.value), study.STAGES, _STAGES.value, part)
        return
    reuse = [Path(directory) for directory in _REUSE.value]
    study.run(_CONFIG.value, Path(_WORKDIR.value), _STAGES.value, reuse)


if __name__ == "__main__":
    command.run(main)
