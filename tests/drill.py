"""Kills a study at random moments, resumes it each time, and compares it with an undisturbed run.

What `tests/drill.sh` runs. The moments are spread over the undisturbed run's length, so that they meet
all stages, the start-up and the report.
"""

import argparse
import collections
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
START, REPORT = "start-up", "report"
TIMES = (
    "training_seconds",
    "examples_per_second",
    "ms_for_",
)  # metrics that are times, by how they begin
PARTIAL = ("*.partial", "*.orbax-checkpoint-tmp*")  # files that are being written


class Kill(NamedTuple):
    """A kill so many seconds after a phase of the run has begun."""

    phase: str
    delay: float


class Attempt(NamedTuple):
    """How one start of the command ended: status and last phase; when each phase began, and its end."""

    status: int
    phase: str
    begun: dict[str, float]
    ended: float


def phase_of(output: str, phases: Sequence[str]) -> str:
    """The phase of a run that has printed this; `phases` are all, in order."""
    phase = START
    for name, event in re.findall(r"^(\w+): (running|done in|finished before)", output, re.M):
        if event == "running":
            phase = name
        elif [name, REPORT] == phases[-2:]:
            phase = REPORT
    return phase


def choose(lengths: Mapping[str, float], count: int, chance: random.Random) -> list[Kill]:
    """Moments in order, one in each of `count` equal parts of a run whose phases have these lengths."""
    part, kills = sum(lengths.values()) / count, []
    for i in range(count):
        delay = (i + chance.random()) * part
        for phase, length in lengths.items():
            if delay < length:
                kills.append(Kill(phase, delay))
                break
            delay -= length
    return kills


def deal(kills: Sequence[Kill], each: int, chance: random.Random) -> list[list[Kill]]:
    """Kills dealt to runs, about `each` to one; those of the start-up come anywhere in a run."""
    runs = -(-len(kills) // each)
    dealt = [[kill for kill in kills[i::runs] if kill.phase != START] for i in range(runs)]
    for i, kill in enumerate(kills):
        if kill.phase == START:
            mine = dealt[i % runs]
            mine.insert(chance.randint(0, len(mine)), kill)
    return dealt


def comparable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what is a time."""
    timed = {"seconds"} | ({"value", "values", "std"} if row["metric"].startswith(TIMES) else set())
    return {name: value for name, value in row.items() if name not in timed}


def differences(
    rows: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Lines that say which rows are not the expected ones, bit for bit."""
    found = [] if len(rows) == len(expected) else [f"{len(rows)} rows instead of {len(expected)}"]
    for mine, theirs in zip(map(comparable, rows), map(comparable, expected), strict=False):
        for name in sorted({*mine, *theirs}):
            if repr(mine.get(name)) != repr(theirs.get(name)):
                place = f"{theirs['table']}, {theirs['row']}, {theirs['metric']}"
                found.append(f"{place}: {name} {mine.get(name)!r} instead of {theirs.get(name)!r}")
    return found


def partial_files(folder: Path) -> list[Path]:
    return [path for pattern in PARTIAL for path in folder.rglob(pattern)]


def attempt(
    study: str, folder: Path, cache: Path, phases: list[str], kill: Kill | None = None
) -> Attempt:
    """Starts the command in a process group of its own; kills the group if it lives until then."""
    log, begun = folder.with_suffix(".log"), {START: time.monotonic()}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.main", f"--workdir={folder}"]
            + [f"--config=experiments/{study}/config.py:smoke"],
            cwd=ROOT,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while process.poll() is None and not (kill and is_time(kill, begun, phases)):
            begun.setdefault(phase_of(log.read_text(), phases), time.monotonic())
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    return Attempt(status, phase_of(log.read_text(), phases), begun, time.monotonic())


def is_time(kill: Kill, begun: Mapping[str, float], phases: list[str]) -> bool:
    """Whether a run is to be killed now; a phase finished before begins with the next one."""
    since = [begun[phase] for phase in phases[phases.index(kill.phase) :] if phase in begun]
    return bool(since) and time.monotonic() - min(since) >= kill.delay


def undisturbed(study: str, folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows, and each phase's seconds: the shorter of two runs, the second with compiled programs."""
    folder.mkdir()
    phases: list[str] = []
    lengths: list[list[float]] = []
    for name in ("first", "second"):
        done = attempt(study, folder / name, folder / "cache", phases)
        if done.status != 0:
            sys.exit(f"the undisturbed run failed: see {folder / name}.log")
        times = [*done.begun.values(), done.ended]
        lengths.append([after - before for before, after in itertools.pairwise(times)])
        print(f"undisturbed: {done.ended - done.begun[START]:.1f} s", flush=True)
        phases = phases or [*done.begun, REPORT]
    if found := differences(read_rows(folder / "second"), read_rows(folder / "first")):
        sys.exit("\n".join(["two undisturbed runs differ:", *found]))
    shorter = [min(both) for both in itertools.zip_longest(*lengths, fillvalue=float("inf"))]
    return read_rows(folder / "first"), dict(zip(phases, shorter, strict=True))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())


def finish(study: str, folder: Path, kills: list[Kill], phases: list[str]) -> tuple[list[str], int]:
    """Runs a study to its end, killed on the way: the phases it was killed in, and writes cut short."""
    killed: list[str] = []
    cut: set[Path] = set()
    for kill in [*kills, None]:
        done = attempt(study, folder, folder.parent / "cache", phases, kill)
        if done.status == 0:
            break
        if done.status != -signal.SIGKILL or kill is None:
            raise RuntimeError(f"ended with status {done.status}: see {folder}.log")
        killed.append(done.phase)
        cut.update(partial_files(folder))
    return killed, len(cut)


def drill(study: str, count: int, each: int, seed: int, folder: Path) -> bool:
    """Makes all kills, and prints the counts and the verdict; whether all was well."""
    chance = random.Random(seed)
    expected, lengths = undisturbed(study, folder / "undisturbed")
    made: collections.Counter[str] = collections.Counter()
    all_cut, wrong, waiting = 0, 0, []
    for number in itertools.count():
        if made.total() >= count:
            break
        waiting = waiting or deal(choose(lengths, count - made.total(), chance), each, chance)
        run = folder / f"run_{number}"
        killed, cut = finish(study, run, waiting.pop(), list(lengths))
        faults = differences(read_rows(run), expected)
        faults += [f"{path} is left" for path in partial_files(run)]
        faults += [] if (run / "report.html").exists() else ["there is no report"]
        made.update(killed)
        all_cut, wrong = all_cut + cut, wrong + len(faults)
        print("\n".join([f"run {number}: killed in {', '.join(killed)}", *faults]), flush=True)
        if not faults:
            shutil.rmtree(run)
    print(f"{made.total()} kills in {number} runs, {all_cut} writes cut short:")
    print(", ".join(f"{phase} {made[phase]}" for phase in lengths))
    print(f"{wrong} FAULTS" if wrong else f"all {len(expected)} rows equal, bit for bit")
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=("mnist", "speech", "specialists"))
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--each", type=int, default=10, help="kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=f"drill_{arguments.study}_"))
    well = drill(arguments.study, arguments.kills, arguments.each, arguments.seed, folder)
    if not well:
        sys.exit(f"what is left: {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
