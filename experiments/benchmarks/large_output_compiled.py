"""Memory of the loss fused with the output layer on TPUs and GPUs, by their compilers; nothing is run.

    python -m experiments.benchmarks.large_output_compiled --machines=v5e:2x2

The mean loss of labels and its gradients in activations and layer, in bfloat16, on one device: dense,
fused, and by tokamax's `linear_softmax_cross_entropy_loss` if that is installed (its form for XLA, and
its kernel for TPUs). The last line is the result as JSON.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from distill_jax.command import run
from distill_jax.errors import UserError
from experiments.compiled import targets

_MACHINES = flags.DEFINE_list("machines", ["v5e:2x2"], "As for --compile_for of launch.main.")
_SIZES = flags.DEFINE_list(
    "sizes", ["8192x2560x14000", "8192x4096x128256"], "Examples x units x classes."
)

Way = Callable[..., Any]
"""`(hidden [B, D], kernel [D, C], labels [B]) -> mean loss`."""


def main() -> None:
    """Compiles, and prints the table and the JSON line."""
    machines = targets.parse(_MACHINES.value)
    targets.prepare(machines)
    import jax

    from distill_jax import platforms

    figures: dict[str, dict[str, float]] = {}
    print(f"{'machine':10}{'examples x units x classes':>28}{'way':>20}{'temporary MB':>22}")
    for machine in machines:
        device = targets.devices(machine)[0]
        for size in _SIZES.value:
            shapes = _shapes(size, jax.sharding.SingleDeviceSharding(device))
            for name, way in _ways(machine.chip.platform):
                with platforms.compiling_for(machine.chip.platform):
                    memory = _compile(way, shapes)
                temporary = memory if isinstance(memory, str) else f"{memory / 1e6:.1f}"
                print(f"{machine.name:10}{size:>28}{name:>20}{temporary:>22}", flush=True)
                if not isinstance(memory, str):
                    figures[f"{machine.name} {size} {name}"] = {"temporary_bytes": memory}
    result = {"benchmark": "large_output_compiled", "figures": figures}
    print(json.dumps(result))


def _shapes(size: str, where: Any) -> tuple[Any, ...]:
    """Activations, kernel and labels."""
    import jax
    import jax.numpy as jnp

    try:
        examples, units, classes = map(int, size.split("x"))
    except ValueError:
        raise UserError(
            f"--sizes={size}: expected three numbers, such as 8192x2560x14000"
        ) from None
    sizes = (
        ((examples, units), jnp.bfloat16),
        ((units, classes), jnp.bfloat16),
        ((examples,), jnp.int32),
    )
    return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in sizes)


def _compile(way: Way, shapes: tuple[Any, ...]) -> int | str:
    """Bytes of temporary memory of the loss and its gradients, or why there are none."""
    import jax

    try:
        lowered = jax.jit(jax.value_and_grad(way, (0, 1))).lower(*shapes)
        memory: Any = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return "too much" if "RESOURCE_EXHAUSTED" in str(error) else type(error).__name__


def _ways(platform: str) -> Iterator[tuple[str, Way]]:
    import jax.numpy as jnp

    from distill_jax import fused_loss, losses

    def dense(hidden: Any, kernel: Any, labels: Any) -> Any:
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return jnp.mean(losses.hard_cross_entropy(logits, labels))

    def fused(hidden: Any, kernel: Any, labels: Any) -> Any:
        def loss(logits: Any, own: Any, constants: Any) -> Any:
            return losses.hard_cross_entropy(logits, own)

        return fused_loss.mean_loss(loss, hidden, {"kernel": kernel}, labels, None)[0]

    yield "dense", dense
    yield "fused", fused
    try:
        import tokamax
    except ImportError:
        return
    for name in ("xla", *(["mosaic_tpu"] if platform == "tpu" else [])):

        def theirs(hidden: Any, kernel: Any, labels: Any, name: str = name) -> Any:
            return tokamax.linear_softmax_cross_entropy_loss(
                hidden, labels, kernel, reduction="mean", implementation=name
            )

        yield f"tokamax {name}", theirs


if __name__ == "__main__":
    run(main)
