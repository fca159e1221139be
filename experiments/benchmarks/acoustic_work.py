"""The work that `acoustic_step` times."""

import functools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import layers, soft_targets, step_losses, train_step
from distill_jax.epochs import make_epoch
from distill_jax.errors import UserError
from distill_jax.models import Model, Params
from experiments.benchmarks.measure import seconds
from experiments.benchmarks.scaling_plan import parameter_count
from experiments.common.training import arithmetic, build_model, build_optimizer

FRAMES = (26, 40)
KEPT = 64  # of a store's soft targets
TEACHERS = {"hard": 0, "stored": 0, "online_1": 1, "online_10": 10}
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of the loss of the first steps, relative


Figures = dict[str, float]
"""Of one way: "seconds" of a step, "utilisation" and so on."""


class Way(NamedTuple):
    """One way to train. targets: a key of TEACHERS."""

    targets: str
    fused: bool

    @property
    def name(self) -> str:
        """As in the results."""
        return f"{self.targets}{' fused' if self.fused else ''}"


class Job(NamedTuple):
    """What is trained. net: the study's section, with the sizes asked for. targets: keys of TEACHERS."""

    net: ConfigDict
    classes: int
    steps: int
    targets: Sequence[str]

    @property
    def parameters(self) -> int:
        """Weights and biases of the net."""
        return parameter_count((math.prod(FRAMES), *self.net.hidden, self.classes))

    @property
    def ways(self) -> list[Way]:
        """With each of the targets: first with all logits in memory, then fused."""
        return [Way(targets, fused) for fused in (False, True) for targets in self.targets]


def parse_hidden(text: str) -> tuple[int, ...]:
    """Hidden layers written as units x layers, such as 2560x8; else a UserError."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise UserError(f"--hidden is {text!r}; expected units x layers, such as 2560x8")
    units, layers = map(int, text.split("x"))
    return (units,) * layers


def step_flops(parameters: int, batch_size: int, teachers: int) -> int:
    """Operations of the matrix products of a step: 2 forward and 4 backward for a weight and example."""
    return (6 + 2 * teachers) * parameters * batch_size


def ratios(ways: Mapping[Way, Figures]) -> dict[str, float]:
    """Costs beside hard targets, and of the fused loss beside the other: below 1 it needs less."""
    found = {}
    for way, figures in ways.items():
        hard = way._replace(targets="hard")
        if way != hard and hard in ways:
            found[f"cost {way.name}/{hard.name}"] = figures["seconds"] / ways[hard]["seconds"]
        if way.fused:
            dense = ways[way._replace(fused=False)]
            for key, what in (("seconds", "time"), ("temporary_bytes", "temporary")):
                found[f"{what} fused/dense {way.targets}"] = figures[key] / dense[key]
    return found


def measure_job(job: Job, matrix: int, rounds: int) -> tuple[float, dict[Way, Figures]]:
    """The device's operations a second in products of matrices of that side; each way's figures."""
    model = build_model(job.net, job.classes)
    optimizer = build_optimizer(job.net, job.steps, job.net.epochs)
    image = jnp.zeros((1, *FRAMES), jnp.uint8)
    fresh = jax.jit(lambda key: train_step.init_state(model, optimizer, key, image))
    key = jax.random.key(0)
    numbers = ("learning_rate", "temperature", "hard_weight")
    hyper = {name: jnp.float32(job.net[name]) for name in numbers}
    teachers = _teachers(job, model)
    examples = {targets: _examples(job, targets) for targets in job.targets}
    constants = {targets: _constants(targets, teachers) for targets in job.targets}

    def build(way: Way) -> Any:
        run = jax.jit(_epoch(job, model, optimizer, way), donate_argnums=0)
        shared = hyper, constants[way.targets]
        return run.lower(jax.eval_shape(fresh, key), examples[way.targets], key, *shared).compile()

    programs = {way: build(way) for way in job.ways}
    state = fresh(key)

    def train(way: Way) -> Array:
        nonlocal state
        shared = hyper, constants[way.targets]
        state, metrics = programs[way](state, examples[way.targets], key, *shared)
        return jax.block_until_ready(metrics["loss"])

    losses = {}
    for way in job.ways:
        losses[way] = float(jnp.sum(train(way)))
        state = fresh(key)
    _check_agreement(losses, job.net.dtype)
    works: dict[str, Callable[[], Any]] = {
        "matrices": _products(matrix, arithmetic(job.net)["dtype"])
    }
    works |= {way.name: functools.partial(train, way) for way in job.ways}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(seconds(work))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    rate = 2 * matrix**3 / medians["matrices"]
    return rate, {
        way: _figures(job, way, medians[way.name] / job.steps, rate)
        | {"temporary_bytes": programs[way].memory_analysis().temp_size_in_bytes}
        for way in job.ways
    }


def _figures(job: Job, way: Way, step: float, rate: float) -> Figures:
    """The figures of a way whose step takes `step` seconds, on a device with this rate."""
    flops = step_flops(job.parameters, job.net.batch_size, TEACHERS[way.targets])
    return {
        "seconds": step,
        "steps_per_second": 1 / step,
        "flop_per_second": flops / step,
        "utilisation": flops / step / rate,
    }


def _check_agreement(losses: Mapping[Way, float], dtype: str) -> None:
    """Raises a UserError unless the fused losses are the others."""
    for way, loss in losses.items():
        dense = losses[way._replace(fused=False)]
        if not abs(loss - dense) <= TOLERANCE[dtype] * abs(dense):
            raise UserError(f"{way.name}: the loss is {loss:.6g}, but {dense:.6g} if not fused")


def _products(size: int, dtype: Any) -> Callable[[], Any]:
    """The yardstick: what multiplies two square matrices."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in (0, 1))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    return lambda: jax.block_until_ready(product(a, b))


def _teachers(job: Job, model: Model) -> Params:
    """Ten nets of random weights, in the dtype of the arithmetic, as they are frozen."""
    image, dtype = jnp.zeros((1, *FRAMES), jnp.uint8), arithmetic(job.net)["dtype"]

    def init(key: Array) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(key, image))

    keys = jax.random.split(jax.random.key(1), max(TEACHERS.values()))
    return jax.jit(lambda keys: jax.lax.map(init, keys))(keys)


def _constants(targets: str, teachers: Params) -> dict[str, Any]:
    """The frozen teachers that the step runs."""
    if not TEACHERS[targets]:
        return {}
    some = jax.tree.map(lambda leaf: leaf[: TEACHERS[targets]], teachers)
    return {"teacher": some, "teacher_layer": some[layers.OUTPUT]}


def _examples(job: Job, targets: str) -> train_step.Batch:
    """Random frames with their targets."""
    random = np.random.default_rng(0)
    size = job.steps * job.net.batch_size
    examples: dict[str, Any] = {
        "inputs": jnp.asarray(random.integers(0, 256, (size, *FRAMES), np.uint8)),
        "label": jnp.asarray(random.integers(0, job.classes, size).astype(np.int32)),
    }
    if targets == "stored":
        share = job.classes // KEPT  # a class of each such part: an example's are distinct
        ids = share * np.arange(KEPT) + random.integers(0, share, (size, KEPT))
        probabilities = random.dirichlet(np.ones(KEPT + 1), size).astype(np.float32)
        fields = (
            jnp.asarray(ids.astype(np.uint16)),
            jnp.asarray(probabilities[:, :KEPT], jnp.bfloat16),
            jnp.asarray(probabilities[:, KEPT]),
        )
        examples |= dict(zip(soft_targets.TOP_K_FIELDS, fields, strict=True))
    return examples


def _epoch(job: Job, model: Model, optimizer: Any, way: Way) -> Callable[..., Any]:
    """The steps as one program."""
    losses = {"hard": step_losses.label_loss, "stored": step_losses.top_k_distillation_loss()}
    online = step_losses.hidden_teacher_loss() if way.fused else step_losses.distillation_loss
    loss = losses.get(way.targets, online)
    transforms = []
    if TEACHERS[way.targets]:
        transforms = [_ask_hidden(model) if way.fused else _ask(job, model)]
    step = train_step.make_train_step(
        model, optimizer, train_step.Fused(loss) if way.fused else loss, transforms=transforms
    )
    return make_epoch(step, job.net.batch_size)


def _ask(job: Job, model: Model) -> train_step.Transform:
    """The teacher's logits, or those of the mean of several; one teacher after the other."""

    def logits(teachers: Params, inputs: Array) -> Array:
        each = jax.lax.map(lambda params: model.apply(params, inputs), teachers)
        if len(each) == 1:
            return each[0]
        return soft_targets.ensemble_logits(each, job.net.temperature, "arithmetic")

    return train_step.online_teacher(logits)


def _ask_hidden(model: Model) -> train_step.Transform:
    """The teachers' last hidden activations."""
    one = model.hidden
    assert one is not None

    def hidden(teachers: Params, inputs: Array) -> Array:
        each = jax.lax.map(lambda params: one(params, inputs), teachers)
        return jnp.moveaxis(each, 0, 1)

    return train_step.online_teacher_hidden(hidden)
