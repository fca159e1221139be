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

import functools
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from distill_jax.data import sources
from distill_jax.data.epochs import steps_per_epoch
from distill_jax.errors import UserError
from experiments.mnist.config import get_config

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

TRAIN_EXAMPLES, PIXELS, CLASSES = 60000, 28 * 28, 10
MEMBERS = 5
EPOCHS = 40  # the learning rate's schedule is planned for so many
SECTIONS = {"teacher": "teacher", "student": "distilled"}  # of the config

RunEpoch = Callable[[], None]
"""Trains for one more epoch and waits until it is done."""


class Case(NamedTuple):
    """One thing to measure.

    way: ours, vmapped (several nets as one program), in_turn (several nets, one after the other),
        pytorch_eager or pytorch_compile.
    net: a key of SECTIONS.
    """

    way: str
    net: str

    @property
    def framework(self) -> str:
        """The worker that measures it."""
        return "torch" if self.way.startswith("pytorch") else "jax"

    @property
    def members(self) -> int:
        """How many nets it trains."""
        return MEMBERS if self.way in ("vmapped", "in_turn") else 1


CASES = (
    *(Case(way, net) for net in SECTIONS for way in ("ours", "pytorch_eager", "pytorch_compile")),
    Case("vmapped", "student"),
    Case("in_turn", "student"),
)


class Times(NamedTuple):
    """Seconds of a case: its first epoch, which compiles, and the median of the others."""

    first: float
    epoch: float


def main(argv: Sequence[str]) -> None:
    """Measures, or is one of the two processes that train."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        _serve() if _WORKER.value else _report()
    except UserError as error:
        sys.exit(f"error: {error}")


# ---- The driver


def _report() -> None:
    """Measures all cases, prints the table and the JSON line."""
    pytorch = _PYTORCH.value and _find_torch()
    device = _common_device(pytorch)
    cases = [case for case in CASES if pytorch or case.framework == "jax"]
    with _workers(sorted({case.framework for case in cases}), device) as workers:
        names = {name: worker.hello for name, worker in workers.items()}
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
        print(
            "PyTorch is not installed, so these are our figures only: "
            "pip install distill_jax[bench], or in a checkout pip install -e .[bench]"
        )
    return found


def _common_device(pytorch: bool) -> str:
    """GPU if every framework that is measured has one."""
    # Asked in processes of their own: whoever opens a GPU takes a part of its memory.
    questions = ["import jax; print(jax.default_backend() == 'gpu')"]
    if pytorch:
        questions.append("import torch; print(torch.cuda.is_available())")
    answers = [
        subprocess.run([sys.executable, "-c", question], stdout=subprocess.PIPE, text=True).stdout
        for question in questions
    ]
    return "gpu" if all(answer.strip() == "True" for answer in answers) else "cpu"


class _Worker:
    """A process that keeps one framework's nets and trains them when asked.

    One process for each framework, not one for both: each then has its threads, allocator and
    floating-point modes as if alone. Only one worker trains at a time; the other waits in a read.
    OpenMP's idle threads spin for 5 to 8 ms after PyTorch's last operation (XLA's don't), which is
    little beside an epoch, so they keep their default, the one that is best for PyTorch.
    """

    def __init__(self, framework: str, device: str, cache: str):
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "experiments.benchmarks.mnist_epoch"),
                *(f"--worker={framework}", f"--device={device}"),
                *(f"--batch_size={_BATCH_SIZE.value}", f"--steps={_STEPS.value}"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_worker_env(framework, device, cache),
        )
        self.hello = self._answer()["hello"]

    def train(self, case: Case) -> dict[str, Any]:
        """`{"seconds": ...}` of one more epoch, or `{"error": ...}`."""
        assert self._process.stdin is not None
        print(json.dumps(case), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError("a worker ended early; its own message is above")
        return json.loads(line)


@contextmanager
def _workers(frameworks: Sequence[str], device: str) -> Iterator[dict[str, _Worker]]:
    workers: dict[str, _Worker] = {}
    with tempfile.TemporaryDirectory() as cache:
        try:
            for framework in frameworks:
                workers[framework] = _Worker(framework, device, cache)
            yield workers
        finally:
            for worker in workers.values():
                worker.close()


def _worker_env(framework: str, device: str, cache: str) -> dict[str, str]:
    """The environment of a worker that is to see one device and to compile anew."""
    env = dict(os.environ)
    xla_flags = env.get("XLA_FLAGS", "").split()
    env["XLA_FLAGS"] = " ".join(f for f in xla_flags if "host_platform_device_count" not in f)
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves memory for the other framework
    env["TORCHINDUCTOR_CACHE_DIR"] = cache
    if framework == "jax" and device == "cpu":
        env["JAX_PLATFORMS"] = "cpu"
    return env


def _measure(cases: Sequence[Case], workers: dict[str, _Worker], rounds: int) -> dict[Case, Times]:
    """Trains all cases in turn, `rounds` times after a first one that compiles."""
    first: dict[Case, float] = {}
    left_out = set()
    for case in cases:
        if case.way in left_out:
            continue
        answer = workers[case.framework].train(case)
        if "error" in answer:
            print(f"{case.way} is left out: {answer['error']}")
            left_out.add(case.way)
        else:
            first[case] = answer["seconds"]
    seconds: dict[Case, list[float]] = {case: [] for case in first}
    for _ in range(rounds):
        for case, measured in seconds.items():
            measured.append(workers[case.framework].train(case)["seconds"])
    medians = {case: statistics.median(measured) for case, measured in seconds.items()}
    return {case: Times(first[case], medians[case]) for case in first}


def _figures(case: Case, times: Times) -> dict[str, float]:
    flops = case.members * _steps() * _BATCH_SIZE.value * flops_per_example(_layers(case.net))
    figures = {
        "epoch_seconds": times.epoch * _steps_per_epoch() / _steps(),
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


# ---- The work, counted


def flops_per_example(layers: Sequence[int]) -> int:
    """Multiplications and additions of the matrix products of one training step, per example.

    A product of an a-vector with an [a, b] matrix is 2ab. Backward has two for each layer, for its
    weights and its inputs; the gradient of the images is not needed.
    """
    products = [a * b for a, b in itertools.pairwise(layers)]
    return 2 * sum(products) + 4 * sum(products) - 2 * products[0]


def _layers(net: str) -> list[int]:
    return [PIXELS, *_section(net).hidden, CLASSES]


def _section(net: str) -> ConfigDict:
    return get_config()[SECTIONS[net]]


def _steps_per_epoch() -> int:
    return steps_per_epoch(TRAIN_EXAMPLES, _BATCH_SIZE.value)


def _steps() -> int:
    """Steps of an epoch that are run."""
    return max(1, round(_STEPS.value * _steps_per_epoch()))


def _load_examples() -> sources.Examples:
    """The training examples of so many steps, with random teacher logits."""
    train = sources.load("embedded").train
    logits = np.random.default_rng(0).normal(0, 5, (TRAIN_EXAMPLES, CLASSES)).astype(np.float32)
    # A whole epoch is shuffled out of all; its remainder of a batch is left out afterwards.
    size = TRAIN_EXAMPLES if _STEPS.value == 1 else _steps() * _BATCH_SIZE.value
    return {name: field[:size] for name, field in {**train, "teacher_logits": logits}.items()}


# ---- The workers


def _serve() -> None:
    """Trains the cases named on standard input, and answers each with its seconds."""
    build, hello = (_jax_worker if _WORKER.value == "jax" else _torch_worker)()
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
            # No C++ compiler, mostly. The message goes on for pages.
            _answer(error=str(error).strip().split("\n", 1)[0])
        else:
            _answer(seconds=time.perf_counter() - start)


def _answer(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _jax_worker() -> tuple[Callable[[Case], RunEpoch], str]:
    import jax

    where = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    return _jax_case, f"jax {jax.__version__} on {where}"


def _jax_case(case: Case) -> RunEpoch:
    if case.way != "in_turn":
        return _jax_program(case.net, case.members)(1)[0]
    nets = _jax_program(case.net, 1)(case.members)

    def run() -> None:
        for run_net in nets:
            run_net()

    return run


@functools.cache
def _jax_program(net: str, members: int) -> Callable[[int], list[RunEpoch]]:
    """One program with so many members, set up as a study does it: starts some runs of it."""
    import jax
    import jax.numpy as jnp

    from distill_jax import parallel, training
    from distill_jax.data.epochs import make_epoch
    from distill_jax.data.jitter import jitter
    from experiments.members import build_model, build_optimizer

    section, mesh, batch_size = _section(net), parallel.make_mesh(), _BATCH_SIZE.value
    model = build_model(section, CLASSES)
    optimizer = build_optimizer(section, _steps(), EPOCHS)
    step = training.make_train_step(
        model,
        optimizer,
        training.label_loss if net == "teacher" else training.distillation_loss,
        transforms=[jitter(section.jitter)] if section.jitter else [],
    )
    examples = _load_examples()
    if net == "teacher":
        del examples["teacher_logits"]
    per_member = dict.fromkeys(examples, False)
    run_epoch = make_epoch(step, batch_size, 1, parallel.shard_batch(mesh, batch_size))
    compiled = parallel.compile_epoch(run_epoch, mesh, per_member)
    resident = parallel.put_examples(examples, mesh, per_member)
    names = ["learning_rate"] + ([] if net == "teacher" else ["temperature", "hard_weight"])
    hyper = {name: jnp.full(members, section[name], jnp.float32) for name in names}
    image = jnp.asarray(examples["image"][:1])

    def start(runs: int) -> list[RunEpoch]:
        keys = jax.random.split(jax.random.key(0), runs * members)
        states = parallel.init_members(
            lambda key: training.init_state(model, optimizer, key, image), keys, mesh
        )

        def part(run: int) -> RunEpoch:
            mine = slice(run * members, (run + 1) * members)
            state, my_keys = jax.tree.map(lambda leaf: leaf[mine], states), keys[mine]

            def run_once() -> None:
                nonlocal state
                state, metrics = compiled(state, resident, my_keys, hyper)
                jax.block_until_ready((state, metrics))

            return run_once

        return [part(run) for run in range(runs)]

    return start


def _torch_worker() -> tuple[Callable[[Case], RunEpoch], str]:
    import torch

    # Threads started later take this over; XLA flushes denormals too.
    torch.set_flush_denormal(True)
    if _DEVICE.value == "gpu":
        torch.set_float32_matmul_precision("high")  # TF32
        where = f"{torch.cuda.get_device_name()}, TF32 allowed in both"
    else:
        torch.set_num_threads(os.cpu_count() or 1)
        where = f"cpu, torch.set_num_threads({os.cpu_count()})"
    device = torch.device("cuda" if _DEVICE.value == "gpu" else "cpu")
    examples = {
        name: torch.from_numpy(field).to(device, torch.int64 if name == "label" else None)
        for name, field in _load_examples().items()
        if name != "id"
    }
    return lambda case: _torch_case(case, examples), f"torch {torch.__version__} on {where}"


def _torch_case(case: Case, examples: dict[str, Any]) -> RunEpoch:
    import torch

    section, device = _section(case.net), examples["label"].device
    net = _torch_net(section).to(device).train()
    # The fastest of PyTorch's three, on a CPU too: 3 to 5 times as fast as the default there.
    optimizer = torch.optim.Adam(net.parameters(), lr=section.learning_rate, fused=True)
    steps = _steps()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(steps, EPOCHS * steps))
    loss = (_torch_label_loss if case.net == "teacher" else _torch_distillation_loss)(
        net, section, examples
    )
    hidden = [layer.weight for layer in net if isinstance(layer, torch.nn.Linear)][:-1]

    @torch.no_grad()
    def limit() -> None:
        for weight in hidden:
            weight.renorm_(2, 0, section.max_norm)

    if case.way == "pytorch_compile":
        loss, limit = torch.compile(loss), torch.compile(limit)

    def run() -> None:
        order = torch.randperm(len(examples["label"]), device=device)
        total = torch.zeros(2, device=device)
        for rows in order[: steps * _BATCH_SIZE.value].view(steps, -1):
            mean, errors = loss(rows)
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
            schedule.step()
            if section.max_norm:
                limit()
            total += torch.stack([mean.detach(), errors])
        total.tolist()  # waits for a GPU

    return run


def _torch_net(section: ConfigDict) -> Any:
    """The net of a config section, initialised as ours."""
    from torch import nn

    sizes = [PIXELS, *section.hidden, CLASSES]
    rates = [section.input_dropout] + [section.hidden_dropout] * len(section.hidden)
    layers: list[Any] = []
    for i, (inputs, units) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(inputs, units)
        nn.init.kaiming_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        dropout = [nn.Dropout(rates[i])] if rates[i] else []
        layers += [*([nn.ReLU()] if i else []), *dropout, linear]
    return nn.Sequential(*layers)


def _torch_label_loss(net: Any, section: ConfigDict, examples: dict[str, Any]) -> Callable:
    """Cross-entropy with the labels of jittered images."""
    import torch
    import torch.nn.functional as F

    pixels, labels = section.jitter, examples["label"]
    padded = F.pad(examples["image"], (pixels,) * 4)
    # A view [N, shift down, shift right, 28, 28], indexed once for the whole batch.
    shifted = padded.unfold(1, 28, 1).unfold(2, 28, 1)

    def loss(rows: Any) -> Any:
        down, right = torch.randint(0, 2 * pixels + 1, (2, len(rows)), device=rows.device)
        logits = net(shifted[rows, down, right].flatten(1).float() / 255)
        target = labels[rows]
        errors = (logits.detach().argmax(1) != target).sum()
        return F.cross_entropy(logits, target), errors

    return loss


def _torch_distillation_loss(net: Any, section: ConfigDict, examples: dict[str, Any]) -> Callable:
    """The weighted average of soft and hard cross-entropy."""
    import torch.nn.functional as F

    images, labels, teacher = (
        examples["image"].flatten(1),
        examples["label"],
        examples["teacher_logits"],
    )
    temperature, hard_weight = section.temperature, section.hard_weight

    def loss(rows: Any) -> Any:
        logits, target = net(images[rows].float() / 255), labels[rows]
        soft_targets = (teacher[rows] / temperature).softmax(1)
        soft = temperature**2 * F.cross_entropy(logits / temperature, soft_targets)
        mean = (1 - hard_weight) * soft + hard_weight * F.cross_entropy(logits, target)
        return mean, (logits.detach().argmax(1) != target).sum()

    return loss


def _warmup_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    """The same schedule as `optimizers.cosine`."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / (steps - warmup))))

    return factor


if __name__ == "__main__":
    app.run(main)
