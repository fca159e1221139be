"""The loss of accuracy if soft targets of very many classes are stored in few bytes per example.

    python -m experiments.benchmarks.soft_target_storage

The predictions of a frozen random teacher, sure of some examples and not of others, are written to
stores of soft targets: the k largest, and drawn classes of as many bytes. Students that begin
alike learn from these and from dense targets. They are judged by the share of labels, drawn by the
teacher at temperature 1, that are their first choice: its expectation, the teacher's probability of that
choice, so that no drawing blurs the comparison. Independent draws (arXiv 2503.16870) are compared with
the stores' systematic ones by their gradients. The last line is the result as JSON.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from distill_jax import losses, models, optimizers, ranges, soft_targets, step_losses, train_step
from distill_jax.command import run
from distill_jax.epochs import make_epoch, steps_per_epoch
from distill_jax.errors import UserError
from distill_jax.soft_targets import Kept
from distill_jax.soft_targets.compare import against_dense

_CLASSES = flags.DEFINE_integer("classes", 14_000, "C.", lower_bound=4)
_K = flags.DEFINE_integer(
    "k", 61, "Largest probabilities kept; and draws of as many bytes.", lower_bound=1
)
_TEMPERATURES = flags.DEFINE_list("temperatures", ["1", "2"], "Of the soft targets, each in turn.")
_TRANSFER = flags.DEFINE_integer(
    "transfer_set", 32_768, "Examples that students learn from.", lower_bound=1
)
_TESTED = flags.DEFINE_integer("tested", 4096, "That they are judged on.", lower_bound=1)
_COMPARED = flags.DEFINE_integer("compared", 512, "Whose gradients are compared.", lower_bound=1)
_EPOCHS = flags.DEFINE_integer("epochs", 4, "Of each student.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 128, "Of the students' steps.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Students of each kind, and draws.", lower_bound=2)

_SIZES = (_CLASSES, _K, _TRANSFER, _TESTED, _COMPARED, _EPOCHS, _BATCH, _SEEDS)
_INPUTS = 16
_COLUMNS = {
    "bytes": ".0f",
    "kl": ".4f",
    "total_variation": ".4f",
    "gradient_cosine": ".4f",
    "gradient_bias": ".4f",
    "gradient_noise": ".4f",
    "accuracy": ".3f",
    "accuracy_std": ".3f",
    "less_dense": ".3f",
    "less_dense_std": ".3f",
}

Logits = Callable[[Array], Array]
"""A net: inputs `[B, 16]` -> logits `[B, C]`."""

Fields = dict[str, np.ndarray]
"""Of a batch, `[N, ...]`."""


class Encoding(NamedTuple):
    """A form of the targets.

    size: bytes of an example as stored. fields: for each seed, `[N, ...]`. transforms: of a batch.
    """

    size: int
    fields: list[Fields]
    loss: train_step.Loss
    transforms: Sequence[train_step.Transform] = ()


def main() -> None:
    """Measures at each temperature, and prints the tables and the JSON line."""
    figures: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    for temperature in _temperatures():
        found = measure(temperature)
        _print_table(temperature, found)
        noise = {name: found[name]["gradient_noise"] for name in ("independent", "sampled")}
        variance = (noise["independent"] / noise["sampled"]) ** 2
        ratios[f"T={temperature:g} gradient_variance independent/sampled"] = variance
        figures |= {f"T={temperature:g} {name}": numbers for name, numbers in found.items()}
    result = {
        "benchmark": "soft_target_storage",
        "device": jax.default_backend(),
        **{flag.name: flag.value for flag in _SIZES},
        "ratios": ratios,
        "figures": figures,
    }
    print(json.dumps(result))


def measure(temperature: float) -> dict[str, dict[str, float]]:
    """Writes the stores, trains the students, and gives the figures of each form of the targets."""
    teacher = make_teacher(_CLASSES.value)
    inputs, test_inputs = (
        draw_inputs(flag.value, i) for i, flag in enumerate((_TRANSFER, _TESTED))
    )
    encodings = encode(teacher, inputs, temperature)
    nets = {name: students(encoding, inputs, temperature) for name, encoding in encodings.items()}
    some = inputs[: _COMPARED.value]
    figures = gradient_errors(teacher, some, encodings, nets["dense"][0], temperature)
    expected = losses.softmax(teacher(jnp.asarray(test_inputs)))
    found = {name: judge(own, test_inputs, expected) for name, own in nets.items()}
    for name, accuracies in found.items():
        figures[name]["bytes"] = encodings[name].size
        for metric, values in (
            ("accuracy", accuracies),
            ("less_dense", accuracies - found["dense"]),  # of the same seed
        ):
            figures[name] |= {metric: values.mean(), f"{metric}_std": values.std(ddof=1)}
    best = 100.0 * float(jnp.mean(jnp.max(expected, axis=-1)))
    return {**figures, "teacher": {"accuracy": best}}


def make_teacher(num_classes: int) -> Logits:
    """Fixed and random: classes are directions among features that bend with the inputs.

    How far an example's logits spread depends on its inputs too. Of 14,000 classes at temperature 1,
    the first choice has a probability above 0.9 in a tenth of the examples, below 0.15 in another.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    bend = jax.random.normal(keys[0], (_INPUTS, _INPUTS)) * jnp.float32(1.5 / np.sqrt(_INPUTS))
    directions = jax.random.normal(keys[1], (_INPUTS, num_classes))
    popularity = 0.5 * jax.random.normal(keys[2], (1, num_classes))

    @jax.jit
    def teacher(inputs: Array) -> Array:
        features = jnp.tanh(inputs @ bend)
        features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
        deviation = 3.0 * (10.0 / 3.0) ** jax.nn.sigmoid(2.0 * inputs[:, :1])
        return deviation * (features @ directions + popularity)

    return teacher


def draw_inputs(count: int, seed: int) -> np.ndarray:
    """Normal inputs float32 `[N, 16]`."""
    return np.random.default_rng(seed).standard_normal((count, _INPUTS)).astype(np.float32)


def encode(teacher: Logits, inputs: np.ndarray, temperature: float) -> dict[str, Encoding]:
    """The dense targets, and those of stores that are written and read back; drawn for each seed."""
    digests, seeds = soft_targets.digests(inputs), _SEEDS.value

    def stored(
        encoding: soft_targets.Encoding, k: int, seed: int = 0
    ) -> tuple[soft_targets.Store, Fields]:
        with tempfile.TemporaryDirectory() as folder:
            soft_targets.write(
                folder,
                lambda rows: teacher(jnp.asarray(inputs[rows])),
                digests,
                teacher="random",
                encoding=encoding,
                k=k,
                temperatures=temperature,
                num_classes=_CLASSES.value,
                seed=seed,
                batch_size=256,
            )
            store = soft_targets.load(folder)
            return store, soft_targets.rows(store, np.arange(len(inputs)), temperature)

    def compressed(stores: Sequence[tuple[soft_targets.Store, Fields]]) -> Encoding:
        first = stores[0][0]
        loss = step_losses.top_k_distillation_loss(first.tail_weights[temperature])
        size = soft_targets.bytes_per_example(first)
        return Encoding(size, [fields for _, fields in stores], loss)

    draws = soft_targets.most_draws(4 * _K.value + 4, _CLASSES.value)
    size = 4 * _CLASSES.value + digests.itemsize
    # Computed for each batch, as those of all examples would not fit.
    online = [train_step.online_teacher(lambda _, inputs: teacher(inputs))]
    return {
        "dense": Encoding(size, [{}] * seeds, step_losses.distillation_loss, online),
        "top_k": compressed([stored("top_k", _K.value)] * seeds),
        "sampled": compressed([stored("sampled", draws, i) for i in range(seeds)]),
    }


def students(encoding: Encoding, inputs: np.ndarray, temperature: float) -> list[Logits]:
    """A student for each seed, by soft targets alone."""
    model = models.mlp((128, 64), _CLASSES.value)
    steps = _EPOCHS.value * steps_per_epoch(len(inputs), _BATCH.value)
    optimizer = optimizers.adam(optimizers.cosine(steps, warmup_steps=steps // 10))
    step = train_step.make_train_step(
        model, optimizer, encoding.loss, transforms=encoding.transforms
    )
    run_epochs = make_epoch(step, _BATCH.value, passes=_EPOCHS.value)
    numbers = {"learning_rate": 0.02, "temperature": temperature, "hard_weight": 0.0}
    hyper = {name: jnp.float32(number) for name, number in numbers.items()}

    @jax.jit
    def train(key: Array, examples: train_step.Batch) -> models.Params:
        init_key, train_key = jax.random.split(key)
        state = train_step.init_state(model, optimizer, init_key, examples["inputs"][:1])
        return run_epochs(state, examples, train_key, hyper, {"teacher": {}})[0].params

    # A seed's key is the same for all forms, so its students begin alike and see the same batches.
    unused = np.zeros(len(inputs), np.int32)
    trained = [
        train(jax.random.key(seed), {"inputs": inputs, "label": unused, **fields})
        for seed, fields in enumerate(encoding.fields)
    ]
    return [functools.partial(jax.jit(model.apply), params) for params in trained]


def judge(nets: Sequence[Logits], inputs: np.ndarray, expected: Array) -> np.ndarray:
    """Per cent of labels, drawn with probabilities `[N, C]`, that are each net's first choice."""
    choices = [jnp.argmax(net(jnp.asarray(inputs)), axis=-1) for net in nets]
    hits = [jnp.take_along_axis(expected, own[:, None], axis=-1) for own in choices]
    return 100.0 * np.array([jnp.mean(own) for own in hits], np.float64)


def gradient_errors(
    teacher: Logits,
    inputs: np.ndarray,
    encodings: Mapping[str, Encoding],
    student: Logits,
    temperature: float,
) -> dict[str, dict[str, float]]:
    """`against_dense` of the stores and of independent draws, at a student's logits."""
    logits = student(jnp.asarray(inputs))
    probabilities = losses.softmax(teacher(jnp.asarray(inputs)), temperature)
    mean = jnp.mean(probabilities, axis=0)

    def errors(forms: Sequence[Kept]) -> dict[str, float]:
        found = against_dense(probabilities, forms, logits, temperature, mean)
        return {metric: float(value) for metric, value in found.items() if np.isfinite(value)}

    def kept(fields: Mapping[str, np.ndarray]) -> Kept:
        ids, named, tail = (
            jnp.asarray(fields[x][: len(inputs)]) for x in soft_targets.TOP_K_FIELDS
        )
        return ids, named, tail

    sampled = [kept(fields) for fields in encodings["sampled"].fields]
    independent = [
        (draw_independently(probabilities, ids.shape[1], jax.random.key(i)), share, tail)
        for i, (ids, share, tail) in enumerate(sampled)
    ]
    return {
        "dense": {},
        "top_k": errors([kept(encodings["top_k"].fields[0])]),
        "sampled": errors(sampled),
        "independent": errors(independent),
    }


@functools.partial(jax.jit, static_argnames="draws")
def draw_independently(probabilities: Array, draws: int, key: Array) -> Array:
    """Classes int32 `[N, draws]`, each drawn by itself with the probabilities `[N, C]`."""
    ends = jnp.cumsum(probabilities, axis=-1)
    points = ends[:, -1:] * jax.random.uniform(key, (len(ends), draws))
    find = jax.vmap(lambda ends, points: jnp.searchsorted(ends, points, side="right"))
    return jnp.minimum(find(ends, points), ends.shape[-1] - 1)


def _temperatures() -> list[float]:
    try:
        found = [float(text) for text in _TEMPERATURES.value]
    except ValueError as error:
        raise UserError(f"--temperatures: {error}; expected such as 1,2") from None
    ranges.check_value("--temperatures", found, ranges.several(ranges.above(0), distinct=True))
    return found


def _print_table(temperature: float, figures: Mapping[str, Mapping[str, float]]) -> None:
    print(f"\ntemperature {temperature:g}")
    print(" " * 12 + "".join(f"{name:>17}" for name in _COLUMNS))
    for name, found in figures.items():
        cells = [format(found[x], form) if x in found else "" for x, form in _COLUMNS.items()]
        print(f"{name:12}" + "".join(f"{cell:>17}" for cell in cells))


if __name__ == "__main__":
    run(main)
