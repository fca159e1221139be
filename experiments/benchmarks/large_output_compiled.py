"""Memory of the loss fused with the output layer on TPUs and GPUs, by their compilers.

    python -m experiments.benchmarks.large_output_compiled --machines=v5e:2x2
    python -m experiments.benchmarks.large_output_compiled --machines=cpu:1 --dtype=float32

The mean loss of labels and its gradients in activations and layer, on one device: dense, fused, and by
tokamax's `linear_softmax_cross_entropy_loss` if that is installed (its form for XLA, and its kernel for
TPUs). "output" is mostly the gradients, which tokamax returns in float32 whatever the layer's dtype.
On other machines nothing is run. On the CPU each is timed too, in turn, and its loss compared with the
dense one of float32. The last line is the result as JSON.
"""

import functools
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import flags

from distill_jax.command import run
from distill_jax.errors import UserError
from experiments.benchmarks import measure
from experiments.compiled import targets

_MACHINES = flags.DEFINE_list("machines", ["v5e:2x2"], "As for --compile_for of launch.main.")
_SIZES = flags.DEFINE_list(
    "sizes", ["8192x2560x14000", "8192x4096x128256"], "Examples x units x classes."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "Of activations and kernel."
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each way on a CPU.", lower_bound=1)

Way = Callable[..., Any]
"""`(hidden [B, D], kernel [D, C], labels [B]) -> mean loss`."""


class _Compiled(NamedTuple):
    """A compiled way, or why there is none."""

    program: Any
    why: str = ""


def main() -> None:
    """Compiles, and prints the table and the JSON line."""
    machines = targets.parse(_MACHINES.value)
    targets.prepare(machines)
    import jax

    from distill_jax import platforms

    figures: dict[str, dict[str, float]] = {}
    print(
        f"{'machine':10}{'examples x units x classes':>28}{'way':>20}"
        f"{'temporary MB':>22}{'output MB':>12}{'ms':>10}{'loss, off by':>14}"
    )
    for machine in machines:
        platform = machine.chip.platform
        where = jax.sharding.SingleDeviceSharding(targets.devices(machine)[0])
        for size in _SIZES.value:
            with platforms.compiling_for(platform):
                ways = {name: _compile(way, size, where) for name, way in _ways(platform)}
            timed = _timed(ways, size) if platform == "cpu" else {}
            for name, compiled in ways.items():
                found = _sizes(compiled) | timed.get(name, {})
                print(_line(machine.name, size, name, compiled.why, found), flush=True)
                if found:
                    figures[f"{machine.name} {size} {name}"] = found
    result = {"benchmark": "large_output_compiled", "dtype": _DTYPE.value, "figures": figures}
    print(json.dumps(result))


def _line(machine: str, size: str, name: str, why: str, found: dict[str, float]) -> str:
    columns = [f"{found[key] / 1e6:.1f}" for key in ("temporary_bytes", "output_bytes") if found]
    temporary, output = columns or (why, "")
    more = ("ms", ".0f", 10), ("off_by", ".1e", 14)
    times = "".join(f"{found[key]:>{width}{form}}" for key, form, width in more if key in found)
    return f"{machine:10}{size:>28}{name:>20}{temporary:>22}{output:>12}{times}"


def _numbers(size: str) -> list[int]:
    """Examples, units and classes."""
    try:
        examples, units, classes = map(int, size.split("x"))
    except ValueError:
        raise UserError(
            f"--sizes={size}: expected three numbers, such as 8192x2560x14000"
        ) from None
    return [examples, units, classes]


def _compile(way: Way, size: str, where: Any) -> _Compiled:
    """The loss and its gradients in activations and kernel."""
    import jax
    import jax.numpy as jnp

    examples, units, classes = _numbers(size)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for shape, dtype in (
            ((examples, units), _DTYPE.value),
            ((units, classes), _DTYPE.value),
            ((examples,), jnp.int32),
        )
    ]
    try:
        return _Compiled(jax.jit(jax.value_and_grad(way, (0, 1))).lower(*shapes).compile())
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        too_much = "RESOURCE_EXHAUSTED" in str(error)
        return _Compiled(None, "too much" if too_much else type(error).__name__)


def _sizes(compiled: _Compiled) -> dict[str, float]:
    """Bytes of temporary memory and of what is returned."""
    if compiled.program is None:
        return {}
    memory = compiled.program.memory_analysis()
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }


def _timed(ways: dict[str, _Compiled], size: str) -> dict[str, dict[str, float]]:
    """Median milliseconds of each way, measured in turn, and how far its loss is off, of 1."""
    import jax
    import jax.numpy as jnp

    examples, units, classes = _numbers(size)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (examples, units)).astype(_DTYPE.value)
    kernel = (jax.random.normal(keys[1], (units, classes)) / units**0.5).astype(_DTYPE.value)
    labels = jax.random.randint(keys[2], (examples,), 0, classes)
    exact = jax.jit(dict(_ways("cpu"))["dense"])(
        hidden.astype(jnp.float32), kernel.astype(jnp.float32), labels
    )
    runs = {
        name: functools.partial(compiled.program, hidden, kernel, labels)
        for name, compiled in ways.items()
        if compiled.program is not None
    }
    off = {name: abs(float(once()[0]) / float(exact) - 1) for name, once in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS.value):
        for name, once in runs.items():
            seconds[name].append(measure.seconds(functools.partial(_wait, once)))
    return {
        name: {"ms": 1e3 * statistics.median(found), "off_by": off[name]}
        for name, found in seconds.items()
    }


def _wait(once: Callable[[], Any]) -> None:
    import jax

    jax.block_until_ready(once())


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
