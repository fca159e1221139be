"""The parts of the benchmark `accelerator`: commands that are run once each, and resumed."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax import files
from experiments.compiled.targets import CHIPS


class Part(NamedTuple):
    """A command of this Python. name: of its result, NAME.json."""

    name: str
    arguments: Sequence[str]


def parts(out: Path, device: str) -> list[Part]:
    """What is measured on a device, the shortest first."""
    study = "--config=experiments/{}/config.py:{}"
    smoke = [
        Part(
            f"smoke_{name}",
            ("-m", "launch.main", study.format(name, "smoke"), f"--workdir={out}/smoke-{name}"),
        )
        for name in ("mnist", "speech", "specialists")
    ]
    measured = [
        Part(name, ("-m", f"experiments.benchmarks.{name}", *more))
        for name, more in (
            ("mnist_epoch", ("--rounds=3",)),
            ("acoustic_step", ("--rounds=2",)),
            ("large_output", ("--rounds=3",)),
        )
    ]
    chip = chip_of(device)
    bounds = [
        Part(
            f"compiled_{name}",
            (
                *("-m", "launch.main", study.format(name, "paper"), f"--stages={stages}"),
                *(f"--compile_for={chip}:1", f"--json={out}/compiled_{name}_programs.json"),
            ),
        )
        for name, stages in (("mnist", "teacher,distilled"), ("speech", "ensemble,distilled"))
        if chip
    ]
    return [*smoke[:1], *measured, *bounds, *smoke[1:]]


def run_parts(
    parts: Sequence[Part], out: Path, seconds: float
) -> tuple[Mapping[str, Any], Sequence[str]]:
    """Runs each part that has no result yet, while there is time.

    Returns:
        The results by name, each with its "seconds", and with "error" where it failed; and the names of
        the parts that are left. A part that failed is run again the next time.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    found: dict[str, Any] = {}
    left = []
    for part in parts:
        path = out / f"{part.name}.json"
        if path.exists():
            found[part.name] = files.read_json(path)
            continue
        if time.monotonic() >= end:
            left.append(part.name)
            continue
        print(f"{part.name}: running", file=sys.stderr, flush=True)
        result = _run(part, out, end)
        if result is None:
            left.append(part.name)
            continue
        found[part.name] = result
        if "error" not in result:
            files.write_json(path, result)
    return found, left


def _run(part: Part, out: Path, end: float) -> dict[str, Any] | None:
    """The part's last line if that is JSON, and its seconds; None if the time was up."""
    begun = time.monotonic()
    try:
        ended = subprocess.run(
            [sys.executable, *part.arguments],
            capture_output=True,
            text=True,
            timeout=end - begun,
        )
    except subprocess.TimeoutExpired:
        return None
    (out / f"{part.name}.log").write_text(ended.stdout + ended.stderr)
    seconds = time.monotonic() - begun
    if ended.returncode:
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        return {"error": last, "seconds": seconds}
    lines = ended.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        result = {}
    return {**(result if isinstance(result, dict) else {}), "seconds": seconds}


def ask_device() -> str:
    """The name of JAX's first device, asked in a process of its own: opening a GPU takes its memory."""
    question = "import jax; print(jax.devices()[0].device_kind)"
    answer = subprocess.run([sys.executable, "-c", question], stdout=subprocess.PIPE, text=True)
    return answer.stdout.strip()


def chip_of(device: str) -> str | None:
    """The name that `--compile_for` has for a device; None for others.

    Examples:
        >>> chip_of("NVIDIA H100 80GB HBM3"), chip_of("TPU v5 lite"), chip_of("cpu")
        ('h100', 'v5e', None)
    """
    name = device.lower()
    if name.startswith("tpu"):
        named = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}
        return named.get(name.removeprefix("tpu").strip())
    words = re.findall(r"\w+", name)
    return next((word for word in words if word in CHIPS and word != "cpu"), None)
