"""Back ends for jobs: processes on this machine, Slurm arrays, or printed commands."""

import hashlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.errors import Stopped, UserError

_ARRAY = Path(__file__).with_name("array.sbatch")


class Job(NamedTuple):
    """A command to run. name: for progress and errors. log: its output, if several jobs run at once."""

    name: str
    command: Sequence[str]
    log: Path


Rounds = Sequence[Sequence[Job]]
"""The jobs of a round can run in parallel; a round starts when the previous one has ended."""


def print_commands(rounds: Rounds) -> None:
    """Prints one command per job, quoted for a shell."""
    for jobs in rounds:
        for job in jobs:
            print(shlex.join(job.command))


def run_here(rounds: Rounds, at_once: int) -> None:
    """Runs jobs as processes on this machine, `at_once` at a time; a failure does not stop the others.

    If `at_once` is 1 they write to the terminal. Otherwise they write to their logs, and each gets a
    share of the GPUs in CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: if jobs failed, after all have ended; the message names them.
        Stopped: on SIGTERM, which is passed on to the running jobs, after they have ended.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        failed = [job for jobs in rounds for job in _run_round(jobs, at_once)]
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        logs = [f"{job.name} ({job.log})" if at_once > 1 else job.name for job in failed]
        raise UserError(f"{len(failed)} of {sum(map(len, rounds))} failed: {', '.join(logs)}")


def _stop(number: int, frame: Any) -> None:
    raise Stopped("stopped by SIGTERM")


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    begun: float


def _run_round(jobs: Sequence[Job], at_once: int) -> list[Job]:
    """Runs jobs, `at_once` at a time, and returns those that failed."""
    waiting, failed = list(reversed(jobs)), []
    places: list[_Running | None] = [None] * at_once
    try:
        while waiting or any(places):
            for place, running in enumerate(places):
                if running is None and waiting:
                    job = waiting.pop()
                    print(f"{job.name}: started", flush=True)
                    places[place] = _Running(job, _start(job, place, at_once), time.monotonic())
                elif running is not None and running.process.poll() is not None:
                    failed += [running.job] if _print_end(running) else []
                    places[place] = None
            time.sleep(0.05)
    finally:
        left = [running.process for running in places if running is not None]
        for process in left:
            process.terminate()
        for process in left:
            process.wait()
    return failed


def _start(job: Job, place: int, at_once: int) -> subprocess.Popen:
    """Starts a job; if several run at once, it writes to its log and sees its share of the GPUs."""
    if at_once == 1:
        return subprocess.Popen(job.command)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(gpus) >= at_once:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place::at_once])
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a") as log:
        return subprocess.Popen(job.command, stdout=log, stderr=log, env=environment)


def _print_end(running: _Running) -> int:
    """Prints how a job ended and returns its exit status."""
    status, seconds = running.process.returncode, time.monotonic() - running.begun
    ended = f"failed with status {status}" if status else "finished"
    print(f"{running.job.name}: {ended} after {seconds:.0f} s", flush=True)
    return status


def submit(rounds: Rounds, at_once: int | None, workdir: Path) -> None:
    """Submits a Slurm array per round and returns. Does nothing while earlier ones are in the queue.

    Options come from sbatch's own environment variables, such as SBATCH_PARTITION and SBATCH_GRES.

    Args:
        rounds: the jobs; their nodes must see this directory and `workdir` under the same paths.
        at_once: tasks of an array that may run at the same time; None for all.
        workdir: gets jobs.txt, with a command per line, and the output of the tasks.

    Raises:
        UserError: if Slurm is not installed or rejects the jobs.
    """
    # The queue is searched by name, so that no record of submitted jobs is needed.
    name = f"distill_jax-{hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:8]}"
    queued = _slurm("squeue", "--me", "--noheader", f"--name={name}", "--format=%i %T")
    if queued:
        print(f"in the queue: {', '.join(queued.splitlines())}")
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "jobs.txt"
    commands = [shlex.join(job.command) for jobs in rounds for job in jobs]
    if any("\n" in one for one in commands):
        raise UserError("a value with a line break can't be given to jobs of Slurm")
    path.write_text("".join(f"{one}\n" for one in commands))
    output = f"{workdir}/slurm-".replace("%", "%%") + "%A_%a.txt"
    options, first = [f"--job-name={name}", f"--output={output}"], 1
    for jobs in rounds:
        lines = f"{first}-{first + len(jobs) - 1}" + (f"%{at_once}" if at_once else "")
        words = [*options, f"--array={lines}", str(_ARRAY), str(path)]
        number = _slurm("sbatch", "--parsable", *words).partition(";")[0]
        print(f"job {number}: lines {lines} of {path}")
        options, first = [*options[:2], f"--dependency=afterany:{number}"], first + len(jobs)


def _slurm(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError as error:
        raise UserError(f"no Slurm on this machine: {command[0]} isn't there") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"{shlex.join(command)}: {error.stderr.strip()}") from error
