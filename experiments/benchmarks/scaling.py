"""Steps per second on 1, 2, 4 and 8 devices, their communication, and a plan for larger machines.

    python -m experiments.benchmarks.scaling
    python -m experiments.benchmarks.scaling --nets=mnist --batch_size=512

The MNIST teacher (section 3 of the paper, default preset) and a net of the size of section 4's
acoustic model, 85M parameters, trained as a study trains: the step, scanned, compiled for a mesh.
"strong": the same global batch on all numbers of devices, split over "data", or the net over "model".
"weak": the same batch on each device.

The cost is the time of an example beside that on one device, which has the whole batch (strong) or a
device's share of it (weak); 1 is perfect. CPU devices share the machine's cores, so there it is
overhead; CPU seconds, which other programs disturb less, are compared too. GPUs' times are multiplied
by their number. Every number of devices has a process of its own, and takes turns with one device; the
row of one device shows the noise. Bytes are what each device sends in a step if reductions run in
rings, read off the compiled program and counted on paper.

Then comes a plan for larger machines (`scaling_plan`): for each job the best mesh, and one net at a
time on all chips, with the share of their arithmetic that is used; "split": if each device updated
only its part of the weights. The last line is the result as JSON.
"""

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from distill_jax import program, sharding, step_losses, train_step, units
from distill_jax.command import run
from distill_jax.errors import UserError
from distill_jax.recipe import PLAIN
from experiments.benchmarks import command, scaling_plan
from experiments.benchmarks.command import Ask
from experiments.common.config import changed, net_section
from experiments.common.training import build_model, make_recipe
from experiments.compiled.collectives import collectives
from experiments.compiled.program import sent_bytes
from experiments.mnist.config import get_config

_NETS = flags.DEFINE_list("nets", ["mnist", "acoustic"], "What to train; none: only the plan.")
_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Numbers of devices, from 1 on.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 0, "Examples per step, of the largest number of devices; 0: as many as the net's."
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each kind.", lower_bound=1)
_WORKER = flags.DEFINE_integer("worker", 0, "Internal: be a worker with this number of devices.")

COUNT_FLAG = "--xla_force_host_platform_device_count"


class Net(NamedTuple):
    """A net to train.

    batch_size: of a step on the largest number of devices. steps: run as one program and measured.
    """

    section: ConfigDict
    image: tuple[int, int]
    classes: int
    batch_size: int
    steps: int

    @property
    def layers(self) -> list[int]:
        """Units from inputs to classes."""
        return [self.image[0] * self.image[1], *self.section.hidden, self.classes]


NETS = {
    "mnist": Net(get_config().teacher, (28, 28), 10, 4096, 4),
    # SGD: Adam's moments on 8 devices of one machine would take 5 GB.
    "acoustic": Net(
        ConfigDict(net_section(hidden=scaling_plan.ACOUSTIC[1:-1], optimizer="sgd")),
        (26, 40),
        scaling_plan.ACOUSTIC[-1],
        1024,
        1,
    ),
}


class Case(NamedTuple):
    """What a process trains: its devices lie on `axis`, and share each batch."""

    net: str
    axis: str
    batch_size: int


class Point(NamedTuple):
    """A row of the table: several devices beside one; sent and on_paper: bytes of a device and step."""

    batch_size: int
    one_steps_per_second: float
    steps_per_second: float
    cost: float
    cpu_cost: float
    sent: float
    on_paper: float


def main() -> None:
    """Measures, or is one of the worker processes."""
    _serve() if _WORKER.value else _report()


def _report() -> None:
    """Measures all points, prints the tables and the JSON line."""
    if unknown := set(_NETS.value) - set(NETS):
        raise UserError(f"--nets has {sorted(unknown)}; expected some of {', '.join(NETS)}")
    backend, counts = _devices()
    points: dict[str, Point] = {}
    for net in _NETS.value:
        print(
            f"\n{'':26}{'batch':>7}{'one/s':>9}{'steps/s':>9}{'cost':>7}{'CPU':>7}"
            f"{'MB sent':>10}{'on paper':>10}"
        )
        for name, point in _measure(net, backend, counts):
            points[name] = point
            print(
                f"{name:26}{point.batch_size:7}{point.one_steps_per_second:9.3f}{point.steps_per_second:9.3f}"
                f"{point.cost:7.2f}{point.cpu_cost:7.2f}"
                f"{point.sent / 1e6:10.3f}{point.on_paper / 1e6:10.3f}",
                flush=True,
            )
    result = {
        "benchmark": "scaling",
        "device": backend,
        "rounds": _ROUNDS.value,
        "ratios": {f"cost {name}": point.cost for name, point in points.items()},
        "figures": {name: point._asdict() for name, point in points.items()},
        "plans": _print_plans(),
    }
    print(json.dumps(result))


def _devices() -> tuple[str, list[int]]:
    """The back end, and the numbers of devices that it can have."""
    # In a process of its own, because opening a GPU takes a part of its memory.
    question = "import jax; print(jax.default_backend(), jax.local_device_count())"
    answer = subprocess.run([sys.executable, "-c", question], stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        raise UserError("JAX doesn't start; its own message is above")
    backend, available = answer.stdout.split()
    if backend not in ("cpu", "gpu"):
        raise UserError(
            f"{backend} devices can't be shared out to processes: set JAX_PLATFORMS=cpu"
        )
    try:
        counts = sorted({int(count) for count in _DEVICES.value})
    except ValueError:
        counts = []
    if not counts or counts[0] != 1:
        raise UserError(f"--devices={','.join(_DEVICES.value)}: expected numbers such as 1,2,4,8")
    return backend, [count for count in counts if backend == "cpu" or count <= int(available)]


def _measure(net: str, backend: str, counts: Sequence[int]) -> Iterator[tuple[str, Point]]:
    """Every point of a net, by its name."""
    batch_size = _BATCH_SIZE.value or NETS[net].batch_size
    sharding.check_divides(batch_size, counts[-1], "--batch_size", "devices")
    share = batch_size // counts[-1]
    whole, part = (Case(net, "data", size) for size in (batch_size, share))
    ways = {
        "strong data": (whole, lambda count: whole),
        "strong model": (whole, lambda count: Case(net, "model", batch_size)),
        "weak data": (part, lambda count: Case(net, "data", share * count)),
    }
    with _worker(backend, 1) as ask_one:
        for count in counts:
            with _worker(backend, count) as ask_many:
                for way, (alone, case) in ways.items():
                    if count > 1 or way == "strong data":
                        point = _compare(
                            ask_one, alone, ask_many, case(count), count=count, backend=backend
                        )
                        yield f"{net} {way} {count}", point


def _compare(
    ask_one: Ask, alone: Case, ask_many: Ask, case: Case, *, count: int, backend: str
) -> Point:
    """Measures one device and several in turn."""
    one, many = [], []
    for _ in range(_ROUNDS.value):
        one.append(ask_one(alone))
        many.append(ask_many(case))

    def cost(what: str) -> float:
        per_example = [
            statistics.median(answer[what] for answer in answers) / batch_size
            for answers, batch_size in ((one, alone.batch_size), (many, case.batch_size))
        ]
        return per_example[1] / per_example[0]

    chips = 1 if backend == "cpu" else count  # CPU devices share the cores
    data, model = (count, 1) if case.axis == "data" else (1, count)
    return Point(
        case.batch_size,
        1 / statistics.median(answer["seconds"] for answer in one),
        1 / statistics.median(answer["seconds"] for answer in many),
        chips * cost("seconds"),
        cost("cpu_seconds"),
        many[0]["sent"],
        scaling_plan.step_bytes(NETS[case.net].layers, case.batch_size, data, model),
    )


def _worker(backend: str, count: int) -> AbstractContextManager[Ask]:
    """Starts a worker with `count` devices, which measures a `Case` on request.

    It answers with a step's "seconds" and "cpu_seconds", and the bytes "sent" in it.
    """
    module, env = "experiments.benchmarks.scaling", _environment(backend, count)
    return command.worker(module, [f"--worker={count}"], env)


def _environment(backend: str, count: int) -> dict[str, str]:
    """The environment of a process that sees `count` devices."""
    env = dict(os.environ)
    if backend == "cpu":
        kept = [flag for flag in env.get("XLA_FLAGS", "").split() if COUNT_FLAG not in flag]
        env["XLA_FLAGS"] = " ".join([*kept, f"{COUNT_FLAG}={count}"])
        env["JAX_PLATFORMS"] = "cpu"
    else:
        visible = env.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[:count])
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves memory for the other process
    return env


def _serve() -> None:
    """Trains the cases named on standard input, and answers each with its measurement."""
    if jax.device_count() != _WORKER.value:
        raise UserError(f"expected {_WORKER.value} devices, but JAX has {jax.device_count()}")
    for line in sys.stdin:
        case = Case(*json.loads(line))
        run, sent = _program(case)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        steps = NETS[case.net].steps
        answer = {
            "seconds": (time.perf_counter() - wall) / steps,
            "cpu_seconds": (time.process_time() - cpu) / steps,
            "sent": sent,
        }
        print(json.dumps(answer), flush=True)


@functools.cache
def _program(case: Case) -> tuple[Callable[[], None], float]:
    """What trains for a few steps as a study does, and the bytes that a device sends in each."""
    net, batch_size = NETS[case.net], case.batch_size
    mesh = (
        sharding.make_mesh(data=-1) if case.axis == "data" else sharding.make_mesh(data=1, model=-1)
    )
    model = build_model(net.section, net.classes)
    recipe = make_recipe(changed(net.section, batch_size=batch_size, report_every=1))
    made = program.make(
        model,
        step_losses.label_loss,
        recipe,
        steps=net.steps,
        classes=net.classes,
        mesh=mesh,
        schedules={},
    )
    examples = _draw(net, net.steps * batch_size)
    per_member = dict.fromkeys(examples, False)
    resident = sharding.put_examples(examples, mesh, per_member)
    keys = jax.random.split(jax.random.key(0), 1)
    image = jnp.asarray(examples["inputs"][:1])
    state = sharding.init_members(
        lambda key: train_step.init_state(model, made.optimizer, key, image), keys, mesh
    )
    hyper = {"learning_rate": jnp.full(1, net.section.learning_rate, jnp.float32)}
    epoch: Any = units.compile_epochs(
        recipe, made.step, mesh, PLAIN, per_member=per_member, own_constants={}
    )
    compiled = epoch.lower(state, resident, keys, hyper, {}).compile()

    def run() -> None:
        nonlocal state
        state, metrics = compiled(state, resident, keys, hyper, {})
        jax.block_until_ready((state, metrics))

    run()
    return run, sent_bytes(collectives(compiled.as_text(), mesh), mesh)


def _draw(net: Net, size: int) -> dict[str, np.ndarray]:
    """Random examples."""
    random = np.random.default_rng(0)
    return {
        "id": np.arange(size, dtype=np.int32),
        "inputs": random.integers(0, 256, (size, *net.image), dtype=np.uint8),
        "label": random.integers(0, net.classes, size).astype(np.int32),
    }


def _print_plans() -> list[dict[str, Any]]:
    """For each job and cluster the best mesh, and one net at a time with all chips on "data"."""
    titles = ("at once", "data", "model", "ms/step", "efficiency", "split", "hours")
    print(f"\n{'plan':40}" + "".join(f"{title:>11}" for title in titles))
    rows = []
    for job, cluster in itertools.product(scaling_plan.JOBS, scaling_plan.CLUSTERS):
        best, *others = scaling_plan.plans(job, cluster)
        for plan in (best, next(plan for plan in others if plan.data == cluster.chips)):
            rows.append({"job": job.name, "cluster": cluster.name, **plan._asdict()})
            print(
                f"{job.name + ', ' + cluster.name:40}{plan.at_once:11}{plan.data:11}{plan.model:11}"
                f"{1000 * plan.step:11.2f}{plan.efficiency:11.1%}{plan.split_efficiency:11.1%}"
                f"{plan.hours:11.3f}"
            )
    return rows


if __name__ == "__main__":
    run(main)
