"""Runs a study from a config.

    python -m launch.main --config=experiments/mnist/config.py:default --workdir=runs/mnist

Any field of the config can be set: --config.distilled.temperature=8. The same command again
resumes where the last one stopped; of a finished study it only writes the report again. With --dry-run
it checks the config, folders and data, says what it would do with each stage, and ends. Compiled
programs are kept in ~/.cache/distill_jax, or in JAX_COMPILATION_CACHE_DIR.

For a run of several processes start this command once for each, with --distributed and a shared
--workdir. SIGTERM saves and exits with status 75; if a process of the run is lost, the others exit with
status 76. After both the same command resumes the run.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from distill_jax.errors import UserError
from launch import command

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results, checkpoints and the report go; needed but for --compile_for."
)
_STAGES = command.define_stages()
_REUSE = flags.DEFINE_multi_string(
    "reuse",
    [],
    "Another workdir, or the folder of a sweep, whose finished stages with the same config are reused; "
    "may be given several times.",
)
_EXTEND = flags.DEFINE_bool(
    "extend",
    False,
    "The config may have more epochs than the workdir's: what is trained continues to them, and stages "
    "that build on it are run again.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Check all that can be checked, print what would be done with each stage, and end.",
)
flags.DEFINE_alias("dry-run", "dry_run")
_LOG = flags.DEFINE_enum(
    "log", None, ["wandb"], "A service that the records of all trainings are sent to as well."
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
_COMPILE_FOR = flags.DEFINE_list(
    "compile_for",
    [],
    "Machines, such as v5e:16x16 or h100:8: compile the stages' programs for each, say whether they "
    "fit, what they send and what time they need at least, and end. Status 1 if one doesn't fit.",
)
_JSON = flags.DEFINE_string("json", None, "A file for what --compile_for found.")


def main(argv: Sequence[str]) -> None:
    """Runs the study that the config names, or compiles it for other machines."""
    if _COMPILE_FOR.value:
        compile_for(_COMPILE_FOR.value)
    else:
        run()


def compile_for(names: Sequence[str]) -> None:
    """Compiles the programs of the config's stages for machines, and runs nothing."""
    from experiments.compiled import targets

    machines = targets.parse(names)
    targets.prepare(machines)
    from distill_jax import files
    from experiments.common import extras
    from experiments.common.config import check_config
    from experiments.common.run import check_names
    from experiments.compiled.check import LOG, check

    config, only = _CONFIG.value, _STAGES.value
    check_config(config)
    check_names(extras.import_study(config.study).STUDY.stages, only)
    study = extras.import_study(config.study.removesuffix("study") + "programs")
    records = check(config, study.programs, study.passes, machines, only)
    count = f"{len(records)} program{'s' if len(records) != 1 else ''}"
    print(f"{count}; what the compilers said is in {LOG}")
    if _JSON.value:
        files.write_json(files.local_path(_JSON.value), records)
    if not all(record["fits"] for record in records):
        sys.exit(1)


def run() -> None:
    """Runs the study that the config names."""
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing: where results, checkpoints and the report go")
    # Nets of equal shape share compiled programs: over stages, resumed runs and points of a sweep.
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "distill_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # JAX reads these settings when it is imported.
    from distill_jax import files, logs, processes
    from experiments.common import extras, parts
    from experiments.common.config import check_config
    from experiments.common.run import plan, run_study

    config, workdir = _CONFIG.value, files.local_path(_WORKDIR.value)
    only = _STAGES.value
    part = None if _PART.value is None else parts.parse_part(_PART.value)
    reuse = [Path(folder) for folder in _REUSE.value]
    if part is not None and _EXTEND.value:
        raise UserError("--part trains a part of one stage: extend the study without it first")
    if part is not None and reuse:
        raise UserError("--part trains a part of one stage and reuses none: leave --reuse out")
    if _LOG.value:
        logs.use(_LOG.value)
    check_config(config, sections=())  # before other processes are waited for
    if not _DRY_RUN.value:
        processes.start(_DISTRIBUTED.value)
        processes.handle_sigterm()
    study = extras.import_study(config.study)
    if part is not None:
        parts.find_stage(workdir, study.STAGES, only)
    how = {"only": only, "reuse": reuse, "extend": _EXTEND.value}
    if part is not None or _DRY_RUN.value:
        lines = plan(config, workdir, study.STUDY, **how)
    if _DRY_RUN.value:
        print(*lines, sep="\n")
    elif part is not None:
        parts.run_part(config, workdir, study.STAGES, only, part)
    else:
        run_study(config, workdir, study.STUDY, **how)


if __name__ == "__main__":
    command.run(main)
