"""Steps per second of section 4's acoustic net, and the share of the device's matrix rate they use.

    python -m experiments.benchmarks.acoustic_step
    python -m experiments.benchmarks.acoustic_step --hidden=2560x4 --batch_size=512

The speech study's net and recipe at the paper's size (preset `paper`: 8 layers of 2560, 14,000 states,
26 frames of 40 filters, Adam), on random frames on one device. Trained on labels ("hard"), on a store's
64 largest soft targets ("stored"), and with one teacher or ten of the same size asked in the step
("online_1", "online_10"); each with all logits of a batch in memory, and with the loss fused with the
output layer (`train_step.Fused`), which must give the same loss.

Utilisation counts 6 operations per weight and example, and 2 for each teacher, and is relative to a
product of large square matrices of the same dtype, measured in the same rounds (A, B, C, A, B, C ...).
"cost" is the time beside that of hard targets. "temporary" is what XLA says that a step takes beside
its state and its examples. The last line is the result as JSON.
"""

import json
from collections.abc import Mapping

import jax
from absl import flags
from ml_collections import ConfigDict

from distill_jax.command import run
from experiments.benchmarks.acoustic_work import (
    TEACHERS,
    Figures,
    Job,
    Way,
    measure_job,
    parse_hidden,
    ratios,
)
from experiments.speech.config import get_config

_HIDDEN = flags.DEFINE_string("hidden", "2560x8", "Units x hidden layers.")
_CLASSES = flags.DEFINE_integer("classes", 14000, "Outputs.", lower_bound=64, upper_bound=2**16)
_BATCH_SIZES = flags.DEFINE_multi_integer(
    "batch_size", [], "Examples per step; by default 1024, and 4096 on a GPU.", lower_bound=1
)
_TARGETS = flags.DEFINE_multi_enum(
    "targets", list(TEACHERS), list(TEACHERS), "What is trained on; by default all."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "",
    ["", "float32", "bfloat16"],
    "Of the arithmetic; by default bfloat16, on a CPU float32.",
)
_STEPS = flags.DEFINE_integer(
    "steps", 0, "Run as one program and timed; 0: 20, on a CPU 1.", lower_bound=0
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each kind.", lower_bound=1)
_MATRIX = flags.DEFINE_integer(
    "matrix",
    0,
    "Side of the matrices whose product is the yardstick; 0: 8192, on a CPU 2048.",
    lower_bound=0,
)


def main() -> None:
    """Measures, prints the tables and the JSON line."""
    device = jax.default_backend()
    small = device == "cpu"
    hidden = parse_hidden(_HIDDEN.value)
    dtype = _DTYPE.value or ("float32" if small else "bfloat16")
    steps = _STEPS.value or (1 if small else 20)
    figures: dict[str, dict[str, Figures]] = {}
    found_ratios: dict[str, float] = {}
    for batch_size in _BATCH_SIZES.value or ([1024] if small else [1024, 4096]):
        net = ConfigDict(get_config("paper").distilled.to_dict())
        net.update(hidden=hidden, dtype=dtype, batch_size=batch_size)
        job = Job(net, _CLASSES.value, steps, _TARGETS.value)
        rate, found = measure_job(job, _MATRIX.value or (2048 if small else 8192), _ROUNDS.value)
        _print_table(job, rate, found)
        batch = f"batch {batch_size}"
        figures[batch] = {way.name: numbers for way, numbers in found.items()}
        figures[batch]["matrices"] = {"flop_per_second": rate}
        found_ratios |= {f"{batch} {name}": ratio for name, ratio in ratios(found).items()}
    print(f"\n{'ratio':52}")
    for name, ratio in found_ratios.items():
        print(f"{name:52}{ratio:8.3f}")
    result = {
        "benchmark": "acoustic_step",
        "device": f"{device}: {jax.devices()[0].device_kind}",
        "dtype": dtype,
        "parameters": job.parameters,
        "steps": steps,
        "rounds": _ROUNDS.value,
        "ratios": found_ratios,
        "figures": figures,
    }
    print(json.dumps(result))


def _print_table(job: Job, rate: float, found: Mapping[Way, Figures]) -> None:
    print(
        f"\n{job.parameters / 1e6:.1f}M parameters, batch {job.net.batch_size}, {job.net.dtype}; "
        f"square matrices: {rate / 1e9:.0f} GFLOP/s"
    )
    titles = ("steps/s", "GFLOP/s", "utilisation", "temporary MB")
    print(f"{'':20}" + "".join(f"{title:>14}" for title in titles))
    for way, figures in found.items():
        print(
            f"{way.name:20}{figures['steps_per_second']:14.3f}{figures['flop_per_second'] / 1e9:14.1f}"
            f"{figures['utilisation']:14.1%}{figures['temporary_bytes'] / 1e6:14.1f}",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
