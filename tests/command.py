"""Runs the command lines as a user does: in processes of their own, on CPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SMOKE = "--config=experiments/mnist/config.py:smoke"
# Most of the tests' time is compilation; these flags take away two thirds of it.
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
# For a run that trains for longer than it compiles.
QUICK_TRAINING = QUICK_COMPILATION.replace("level=0", "level=1")
# Where launch.main keeps compiled programs.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "distill_jax"
ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    **os.environ,
    "JAX_PLATFORMS": "cpu",  # the compiler for TPUs is installed, and would look for some
    "XLA_FLAGS": QUICK_COMPILATION,  # without conftest's eight devices
}


def start(
    *arguments: str, module: str = "launch.main", flags: str = QUICK_COMPILATION
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | {"XLA_FLAGS": flags},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*arguments: str, module: str = "launch.main", flags: str = QUICK_COMPILATION) -> str:
    """Runs to the end; returns what was printed."""
    process = start(*arguments, module=module, flags=flags)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def benchmark(name: str, *arguments: str) -> dict[str, Any]:
    """The result of a benchmark on the machine's CPUs."""
    process = subprocess.run(
        [sys.executable, "-m", f"experiments.benchmarks.{name}", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def fails(*arguments: str, module: str = "launch.main") -> str:
    """Runs a command that must fail with one clear message; returns the message."""
    process = start(*arguments, module=module)
    _, errors = process.communicate()
    messages = [line for line in errors.splitlines() if line.startswith("error:")]
    assert process.returncode == 1 and len(messages) == 1 and "Traceback" not in errors, errors
    return messages[0]


def kill_when(directory: Path, pattern: str, arguments: Sequence[str]) -> None:
    """Starts a command with this working directory, and kills it with -9 once a path matches there."""
    process = start(*arguments, f"--workdir={directory}")
    limit = time.monotonic() + 120
    while not list(directory.glob(pattern)) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(directory.glob(pattern))
