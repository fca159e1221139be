"""Seconds per epoch on MNIST: the default preset's teacher and student, ours against PyTorch.

    python -m experiments.benchmarks.mnist_epoch

Ours is what a study runs: the train step, scanned over an epoch and vmapped over members. PyTorch
trains the same nets eagerly and under `torch.compile`: the same batch size, float32, schedule,
losses, error counts and data resident on the device, with its own dropout and fused Adam. A GPU is
used if both frameworks see one; TF32 is then allowed in both, which is XLA's default. On a CPU both
use all cores.

Every measurement is repeated in rounds (A, B, C, A, B, C ...), so that a slow minute of the machine
hits all alike, and the median is reported. The last line is the result as JSON.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from absl import flags

from distill_jax.command import run
from experiments.benchmarks import command
from experiments.benchmarks.command import Ask
from experiments.benchmarks.mnist_epoch_jax import (
    SECTIONS,
    Case,
    RunEpoch,
    Work,
    flops_per_example,
    layers,
    start_jax,
)

_BATCH_SIZE = flags.DEFINE_integer("batch_size", 512, "Examples per step.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements of each kind.", lower_bound=1)
_STEPS = flags.DEFINE_float(
    "steps",
    1.0,
    "The part of an epoch's steps that is run, for a quick look; seconds stay those of an epoch.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_PYTORCH = flags.DEFINE_bool("pytorch", True, "Measure PyTorch too.")
_WORKER = flags.DEFINE_enum(
    "worker", None, ["jax", "torch"], "Internal: be the process that trains under a framework."
)
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Internal: where a worker trains.")

CASES = (
    *(Case(way, net) for net in SECTIONS for way in ("ours", "pytorch_eager", "pytorch_compile")),
    Case("vmapped", "student"),
    Case("in_turn", "student"),
)


class Times(NamedTuple):
    """Seconds of a case: its first epoch, which compiles, and the median of the others."""

    first: float
    epoch: float


def main() -> None:
    """Measures, or is one of the two worker processes."""
    _serve() if _WORKER.value else _report()


def _report() -> None:
    """Measures all settings, prints the table and the JSON line."""
    pytorch = _PYTORCH.value and _find_torch()
    device = _common_device(pytorch)
    cases = [case for case in CASES if pytorch or case.framework == "jax"]
    with _workers(sorted({case.framework for case in cases}), device) as workers:
        names = {name: ask(None)["hello"] for name, ask in workers.items()}
        for name, hello in names.items():
            print(f"{name}: {hello}")
        times = _measure(cases, workers, _ROUNDS.value)
    _print_table(times)
    result = {
        "benchmark": "mnist_epoch",
        "device": device,
        "frameworks": names,
        "batch_size": _BATCH_SIZE.value,
        "rounds": _ROUNDS.value,
        "steps": _STEPS.value,
        "ratios": _ratios(times),
        "figures": {f"{case.way} {case.net}": _figures(case, t) for case, t in times.items()},
    }
    print(json.dumps(result))


def _find_torch() -> bool:
    found = importlib.util.find_spec("torch") is not None
    if not found:
        print("PyTorch is not installed, so these are our figures only: pip install -e '.[bench]'")
    return found


def _common_device(pytorch: bool) -> str:
    """GPU if every framework that is measured has one."""
    # In processes of their own, because opening a GPU takes a part of its memory.
    questions = ["import jax; print(jax.default_backend() == 'gpu')"]
    if pytorch:
        questions.append("import torch; print(torch.cuda.is_available())")
    answers = [
        subprocess.run([sys.executable, "-c", question], stdout=subprocess.PIPE, text=True).stdout
        for question in questions
    ]
    return "gpu" if all(answer.strip() == "True" for answer in answers) else "cpu"


@contextmanager
def _workers(frameworks: Sequence[str], device: str) -> Iterator[dict[str, Ask]]:
    """Processes that keep one framework's nets and train a `Case` for one more epoch when asked.

    They answer `{"seconds": ...}` or `{"error": ...}`; first of all to a null, who they are.

    One process for each framework, not one for both: each then has its threads, allocator and
    floating-point modes as if alone. Only one worker trains at a time; the other waits in a read.
    OpenMP's idle threads spin for 5 to 8 ms after PyTorch's last operation (XLA's don't), which is
    little beside an epoch, so they keep their default, the one that is best for PyTorch.
    """
    work = (f"--batch_size={_BATCH_SIZE.value}", f"--steps={_STEPS.value}")
    with tempfile.TemporaryDirectory() as cache, ExitStack() as stack:
        yield {
            framework: stack.enter_context(
                command.worker(
                    "experiments.benchmarks.mnist_epoch",
                    [f"--worker={framework}", f"--device={device}", *work],
                    _worker_env(framework, device, cache),
                )
            )
            for framework in frameworks
        }


def _worker_env(framework: str, device: str, cache: str) -> dict[str, str]:
    """The environment of a worker that sees one device and compiles without a cache."""
    env = dict(os.environ)
    xla_flags = env.get("XLA_FLAGS", "").split()
    env["XLA_FLAGS"] = " ".join(f for f in xla_flags if "host_platform_device_count" not in f)
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves memory for the other framework
    env["TORCHINDUCTOR_CACHE_DIR"] = cache
    if framework == "jax" and device == "cpu":
        env["JAX_PLATFORMS"] = "cpu"
    return env


def _measure(cases: Sequence[Case], workers: dict[str, Ask], rounds: int) -> dict[Case, Times]:
    """Trains all cases in turn, `rounds` times after a first one that compiles."""
    first: dict[Case, float] = {}
    left_out = set()
    for case in cases:
        if case.way in left_out:
            continue
        answer = workers[case.framework](case)
        if "error" in answer:
            print(f"{case.way} is left out: {answer['error']}")
            left_out.add(case.way)
        else:
            first[case] = answer["seconds"]
    seconds: dict[Case, list[float]] = {case: [] for case in first}
    for _ in range(rounds):
        for case, measured in seconds.items():
            measured.append(workers[case.framework](case)["seconds"])
    medians = {case: statistics.median(measured) for case, measured in seconds.items()}
    return {case: Times(first[case], medians[case]) for case in first}


def _figures(case: Case, times: Times) -> dict[str, float]:
    work = _work()
    flops = case.members * work.steps * work.batch_size * flops_per_example(layers(case.net))
    figures = {
        "epoch_seconds": times.epoch * work.epoch_steps / work.steps,
        "gflop_per_second": flops / times.epoch / 1e9,
    }
    if case.way not in ("pytorch_eager", "in_turn"):  # in_turn runs the program of ours
        # What the first run took beyond the usual; not below 0, where noise would put it.
        figures["compile_seconds"] = max(times.first - times.epoch, 0.0)
    return figures


def _ratios(times: dict[Case, Times]) -> dict[str, float]:
    """Above 1: the way of this project is the faster one."""
    ratios = {}
    for case in times:
        ours = Case("vmapped" if case.way == "in_turn" else "ours", case.net)
        if case.way not in ("ours", "vmapped"):
            ratios[f"{case.way}/{ours.way} {case.net}"] = times[case].epoch / times[ours].epoch
    return ratios


def _print_table(times: dict[Case, Times]) -> None:
    print(f"\n{'':26}{'nets':>6}{'s/epoch':>10}{'GFLOP/s':>10}{'compile s':>11}")
    for case, measured in times.items():
        figures = _figures(case, measured)
        compiling = f"{figures['compile_seconds']:.1f}" if "compile_seconds" in figures else "-"
        print(
            f"{case.net + ' ' + case.way:26}{case.members:6}{figures['epoch_seconds']:10.3f}"
            f"{figures['gflop_per_second']:10.1f}{compiling:>11}"
        )
    print(f"\n{'ratio of times':26}")
    for name, ratio in _ratios(times).items():
        print(f"{name:32}{ratio:10.2f}")


def _serve() -> None:
    """Trains the cases named on standard input, and answers each with its seconds."""
    build, hello = _start()(_work(), _DEVICE.value == "gpu")
    sys.stdin.readline()
    _answer(hello=hello)
    ready: dict[Case, RunEpoch] = {}
    for line in sys.stdin:
        case = Case(*json.loads(line))
        if case not in ready:
            ready[case] = build(case)
        start = time.perf_counter()
        try:
            ready[case]()
        except RuntimeError as error:
            if case.way != "pytorch_compile":
                raise
            # No C++ compiler, mostly. The message has many lines.
            _answer(error=str(error).strip().split("\n", 1)[0])
        else:
            _answer(seconds=time.perf_counter() - start)


def _start() -> Callable[[Work, bool], tuple[Callable[[Case], RunEpoch], str]]:
    """The worker's framework, and only that one, is imported."""
    if _WORKER.value == "jax":
        return start_jax
    from experiments.benchmarks.mnist_epoch_torch import start_torch

    return start_torch


def _work() -> Work:
    return Work(_BATCH_SIZE.value, _STEPS.value)


def _answer(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    run(main)
