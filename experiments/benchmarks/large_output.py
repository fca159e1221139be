"""Memory and time of the objective fused with the output layer, beside the ways that hold all logits.

    python -m experiments.benchmarks.large_output
    python -m experiments.benchmarks.large_output --shapes=1024x512x14000 --rows=128 --rows=256

Forward and backward of the mean objective (section 2 of the paper; T = 2, half the weight on labels),
with the gradients of the last hidden activations [B, D], of the output layer's kernel [D, C] and of its
bias. "fused" is `large_output.mean_loss`; "dense" the same loss under jit, on the logits of the whole
batch. The soft targets are a frozen teacher's, given as its own activations and output layer
("teacher"), or the 64 largest of a store and the sum of the others ("stored").

PyTorch does the same, eagerly and under `torch.compile`. So does Liger-Kernel's chunked distillation
loss, if it is installed; and on a GPU its fused linear JSD in Triton, which has neither labels nor
biases: there all do without ("soft_only").

Every way must give the same loss and gradients before it is timed. "temporary" is what XLA says that
its program takes beside arguments and output. "peak" is measured, in a process of its own: what is
taken at most beyond the inputs, with the gradients. Times are medians of rounds (A, B, C, A, B, C ...).
All is on a GPU if JAX has one. The last line is the result as JSON.
"""

import functools
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from absl import flags

from distill_jax.command import run
from distill_jax.errors import UserError
from experiments.benchmarks import command, measure
from experiments.benchmarks.command import Ask
from experiments.benchmarks.large_output_jax import Framework, Program, start_jax
from experiments.benchmarks.large_output_work import (
    TARGETS,
    Case,
    Figures,
    check_agreement,
    flops,
    parse_shape,
    ratios,
    summary,
)

_SHAPES = flags.DEFINE_list(
    "shapes", [], "Examples x activations x classes of each; by default two that suit the device."
)
_TARGETS = flags.DEFINE_multi_enum(
    "targets",
    TARGETS,
    TARGETS,
    "Kinds of soft targets; by default all that can be had.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "float32", "bfloat16"], "Of activations and layers; by default as the device."
)
_ROWS = flags.DEFINE_multi_integer(
    "rows", [], "A chunk to try beside the fused way's own choice.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements of each kind.", lower_bound=1)
_PYTORCH = flags.DEFINE_bool("pytorch", True, "Measure PyTorch and Liger-Kernel too.")
_WORKER = flags.DEFINE_enum(
    "worker", None, ["jax", "torch"], "Internal: be the process that works in a framework."
)

SHAPES = {
    "cpu": ["1024x512x14000", "8192x256x14000"],
    "gpu": ["8192x2560x14000", "8192x4096x128256"],
}
DTYPE = {"cpu": "float32", "gpu": "bfloat16"}


def main() -> None:
    """Measures, or is one of the worker processes."""
    _serve() if _WORKER.value else _report()


def _report() -> None:
    """Measures all settings, prints the tables and the JSON line."""
    for text in _SHAPES.value:
        parse_shape(text)
    with tempfile.TemporaryDirectory() as cache:
        worker = functools.partial(_worker, cache)
        device, names = _frameworks(worker)
        dtype = _DTYPE.value or DTYPE[device]
        figures: dict[str, dict[str, Figures]] = {}
        for shape in _SHAPES.value or SHAPES[device]:
            for targets, ways in _ways(device, "torch" in names).items():
                cases = [Case(way, targets, shape, dtype) for way in ways]
                cases += [Case("fused", targets, shape, dtype, rows) for rows in _ROWS.value]
                found = _measure(cases, worker)
                _print_table(found)
                figures[f"{shape} {targets}"] = {case.name: f for case, f in found.items()}
    found_ratios = ratios(figures)
    print(f"\n{'ratio':60}")
    for name, ratio in found_ratios.items():
        print(f"{name:60}{ratio:8.3f}")
    result = {
        "benchmark": "large_output",
        "device": device,
        "frameworks": names,
        "dtype": dtype,
        "rounds": _ROUNDS.value,
        "ratios": found_ratios,
        "figures": figures,
    }
    print(json.dumps(result))


def _frameworks(worker: Callable[[str], AbstractContextManager[Ask]]) -> tuple[str, dict[str, str]]:
    """JAX's device, and the names of the frameworks that can work there."""
    with worker("jax") as ask:
        hello = ask(None)
    device, names = hello["device"], {"jax": hello["name"]}
    if device not in SHAPES:
        raise UserError(f"this benchmark runs on {' or '.join(SHAPES)}, not {device}")
    if _PYTORCH.value and importlib.util.find_spec("torch") is None:
        print("PyTorch is left out, as it isn't installed: pip install -e '.[bench]'")
    elif _PYTORCH.value:
        with worker("torch") as ask:
            hello = ask(None)
        if hello["device"] == device:
            names["torch"] = hello["name"]
        else:
            print(f"PyTorch is left out: it runs on {hello['device']}, and JAX on {device}")
    for name in names.values():
        print(name)
    return device, names


def _ways(device: str, torch: bool) -> dict[str, list[str]]:
    """What is measured, by kind of targets; the first is what the others must agree with."""
    ours = ["dense", "fused"]
    by_hand = ["pytorch_eager", "pytorch_compile"] if torch else []
    ways = {"teacher": [*ours, *by_hand], "stored": [*ours, *by_hand]}
    if torch and importlib.util.find_spec("liger_kernel") is not None:
        ways["teacher"].append("liger_chunked")
        if device == "gpu":
            ways["soft_only"] = [*ours, "liger_jsd"]
    return {targets: ways[targets] for targets in _TARGETS.value if targets in ways}


def _worker(cache: str, framework: str) -> AbstractContextManager[Ask]:
    """A process that answers to null who it is, and to `[task, Case]` with what it found."""
    env = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # leaves memory for the other framework
        "TORCHINDUCTOR_CACHE_DIR": cache,
    }
    module = "experiments.benchmarks.large_output"
    return command.worker(module, [f"--worker={framework}"], env)


def _measure(
    cases: Sequence[Case], worker: Callable[[str], AbstractContextManager[Ask]]
) -> dict[Case, Figures]:
    """Memory and agreement of each case, then their times in turn."""
    figures: dict[Case, Figures] = {}
    reference: dict[str, Any] = {}
    for case in cases:
        with worker(case.framework) as ask:
            answer = ask(["memory", case])
        if "error" in answer:
            print(f"{case.name} is left out: {answer['error']}", flush=True)
            continue
        reference = reference or answer["values"]
        check_agreement(case, answer["values"], reference)
        figures[case] = answer["figures"]
    seconds: dict[Case, list[float]] = {case: [] for case in figures}
    with ExitStack() as stack:
        frameworks = sorted({case.framework for case in figures})
        workers = {name: stack.enter_context(worker(name)) for name in frameworks}
        for turn in range(1 + _ROUNDS.value):
            for case, measured in seconds.items():
                answer = workers[case.framework](["time", case])
                if "error" in answer:
                    raise UserError(f"{case.name} ran by itself, but not now: {answer['error']}")
                if turn:  # the first one compiles
                    measured.append(answer["seconds"])
    for case, measured in seconds.items():
        figures[case]["seconds"] = statistics.median(measured)
        figures[case]["gflop_per_second"] = flops(case) / figures[case]["seconds"] / 1e9
    return figures


def _print_table(found: Mapping[Case, Figures]) -> None:
    first = next(iter(found))
    columns = ("temporary", "argument", "output", "peak")
    titles = [*(f"{column} MB" for column in columns), "ms", "GFLOP/s"]
    print(
        f"\n{first.shape + ' ' + first.targets + ' ' + first.dtype:32}"
        + "".join(f"{title:>14}" for title in titles)
    )
    for case, figures in found.items():
        sizes = [figures.get(f"{column}_bytes") for column in columns]
        memory = "".join(f"{'-':>14}" if size is None else f"{size / 1e6:14.1f}" for size in sizes)
        print(
            f"{case.name:32}{memory}{1000 * figures['seconds']:14.2f}"
            f"{figures['gflop_per_second']:14.1f}",
            flush=True,
        )


def _serve() -> None:
    """Answers the questions on standard input."""
    framework = _start()
    ready: dict[Case, Program] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if question is None:
            answer: dict[str, Any] = {"name": framework.name, "device": framework.device}
        else:
            task, case = question[0], Case(*question[1])
            try:
                if case not in ready:
                    ready[case] = framework.build(case)
                    ready[case].run()
                answer = TASKS[task](framework, ready[case], case)
            except (RuntimeError, ImportError) as error:
                if case.way == "fused":
                    raise
                # No C++ compiler or Triton, or too little memory. The message has many lines.
                answer = {"error": str(error).strip().split("\n", 1)[0]}
        print(json.dumps(answer), flush=True)


def _memory(framework: Framework, program: Program, case: Case) -> dict[str, Any]:
    peak = framework.peak(program.run)
    figures = dict(program.sizes) | ({} if peak is None else {"peak_bytes": peak})
    return {"figures": figures, "values": summary(program.fetch(program.run()), case)}


def _time(framework: Framework, program: Program, case: Case) -> dict[str, Any]:
    return {"seconds": measure.seconds(program.run)}


TASKS: dict[str, Callable[[Framework, Program, Case], dict[str, Any]]] = {
    "memory": _memory,
    "time": _time,
}


def _start() -> Framework:
    """The worker's framework, and only that one, is imported."""
    if _WORKER.value == "jax":
        return start_jax()
    from experiments.benchmarks.large_output_torch import start_torch

    return start_torch()


if __name__ == "__main__":
    run(main)
