"""What is to be known of a GPU or TPU in its first minutes: one command, resumed by the same one.

    python -m experiments.benchmarks.accelerator --out=runs/accelerator

Runs `smoke` of the three studies and the benchmarks of MNIST's epochs, of the acoustic net's step and of
the fused loss, each in a process of its own, and compiles the paper's nets for this device, which says
the least time that they can take. What is done is kept in --out; what doesn't fit in --minutes is left
to the next call. The last line is the result as JSON.
"""

import json

from absl import flags

from distill_jax import files
from distill_jax.command import run
from experiments.benchmarks.accelerator_parts import ask_device, parts, run_parts

_OUT = flags.DEFINE_string("out", "runs/accelerator", "Where each part's result is kept.")
_MINUTES = flags.DEFINE_float(
    "minutes", 8.0, "No part is begun later, or ended later.", lower_bound=0
)


def main() -> None:
    """Runs what isn't done, and prints the JSON line."""
    out = files.local_path(_OUT.value)
    device = ask_device()
    found, left = run_parts(parts(out, device), out, 60 * _MINUTES.value)
    print(
        json.dumps({"benchmark": "accelerator", "device": device, "figures": found, "left": left})
    )


if __name__ == "__main__":
    run(main)
