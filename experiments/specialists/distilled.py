"""Section 8's open question: the specialists' knowledge distilled back into a single net."""

import functools
import time
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import export, nets, soft_targets, step_losses
from distill_jax.data import transfer
from distill_jax.data.images import Examples
from distill_jax.models import Params
from distill_jax.nets import Net
from distill_jax.specialists import inference
from experiments.common import costs
from experiments.common.study import Context, Row, make_row
from experiments.specialists import comparison, generalists, training
from experiments.specialists.comparison import DISTILLED, LABELS
from experiments.specialists.data import load_data, some_rows


def make_soft_targets(context: Context) -> list[Row]:
    """q of Eq. 5 for the transfer set, one store for each seed's generalist and specialists."""
    config, data = context.config, load_data(context.config)
    examples, rows = transfer_set(config)
    digests = soft_targets.digests(examples["inputs"])
    for s, seed in enumerate(config.seeds):
        generalist, found = generalists.load(context, s), training.load_stage(context, s)
        inputs = generalists.training_inputs(context, s)[0][rows]
        q_of = functools.partial(training.predict, config, generalist, found)

        def targets_of(wanted: np.ndarray, q_of=q_of, inputs=inputs) -> np.ndarray:
            return q_of(inputs[wanted])

        directory = context.directory / f"seed_{seed}"
        soft_targets.write(
            directory,
            targets_of,
            digests,
            teacher=f"{generalist.fingerprint} and specialists",
            data={"examples": data.fingerprint},
            encoding="top_k",
            k=min(config.distilled.k, data.num_classes),
            temperatures=1.0,
            probabilities=True,
            num_classes=data.num_classes,
            batch_size=4096,
            progress=_progress(seed),
        )
        size = soft_targets.bytes_per_example(soft_targets.load(directory))
        print(f"soft targets, seed {seed}: {size} bytes an example")
    return []


def distilled(context: Context) -> list[Row]:
    """Single nets of the generalist's size taught by the specialists, and one taught by labels."""
    config, data = context.config, load_data(context.config)
    examples, _ = transfer_set(config)
    taught = []
    for seed in config.seeds:
        stored = soft_targets.load(
            context.inputs["soft_targets"] / f"seed_{seed}",
            data={"examples": data.fingerprint},
            num_classes=data.num_classes,
        )
        taught.append(soft_targets.attach(examples, stored, 1.0))
    before, after = teachers = _teachers(context)
    rows = _rows(config, "generalist", before, teachers)
    rows += _rows(config, comparison.system(config), after, teachers)
    trained = {
        DISTILLED: _train(
            context,
            "from_generalist",
            config.distilled.epochs,
            taught,
            start=generalists.load_all(context).params,
        ),
        "distilled, from scratch": _train(
            context, "from_scratch", config.distilled.scratch_epochs, taught
        ),
        LABELS: _trained_on_labels(context, examples),
    }
    comparison.keep(
        context, {name: comparison.right_of(net, data.test) for name, net in trained.items()}
    )
    for name, net in trained.items():
        values = list(generalists.accuracies(net, data)["test"])
        rows += _rows(config, name, values, teachers, net.seconds)
    return rows


def costs_of_nets(context: Context) -> list[Row]:
    """What the generalist with its specialists, and single nets, cost; their predictions."""
    config, test = context.config, load_data(context.config).test
    net, found = generalists.load_all(context).member(0), training.load_stage(context, 0)
    features = export.features_of(net, found)

    def log_q(params: Params, images: Array) -> Array:
        whole, specialists = params
        chosen = found._replace(net=found.net._replace(params=specialists))
        logits = net.model.apply(whole, images)
        n = config.specialists.active_by
        q = inference.predict_all(chosen, logits, features(images), n=n)[1]
        return jnp.log(jnp.maximum(q, 1e-30))

    student = nets.load(context.inputs["distilled"] / "from_generalist")
    candidates = [
        costs.Candidate(
            comparison.system(config),
            log_q,
            (net.params, found.net.params),
        ),
        costs.of_net("generalist", net),
        costs.of_net(DISTILLED, student),
    ]
    return costs.rows(config, "specialists_costs", candidates, test["inputs"], test["label"])


def transfer_set(config: ConfigDict) -> tuple[Examples, np.ndarray]:
    """Some of the examples that specialists are trained on, with ids 0..n-1, and their rows there."""
    whole = generalists.specialist_part(config)
    rows = some_rows(config, len(whole["id"]), config.distilled.examples)
    part = transfer.select(whole, rows)
    return {**part, "id": np.arange(len(rows), dtype=np.int32)}, rows


def recipe(config: ConfigDict, epochs: int) -> ConfigDict:
    """Of the distilled nets and their control on labels: the generalist's but for what they have."""
    both = {**config.generalist.to_dict(), **config.distilled.to_dict()}
    return ConfigDict({**both, "epochs": epochs})


def has_control(config: ConfigDict) -> bool:
    """Whether the generalist that is trained on (`controls.longer`) is the control on labels."""
    own, longer = config.distilled, config.controls
    of_all = own.examples == config.specialists.examples == 0
    alike = (own.epochs, own.learning_rate) == (longer.epochs, config.generalist.learning_rate)
    return of_all and alike


def _train(
    context: Context,
    name: str,
    epochs: int,
    examples: Sequence[Examples],
    *,
    start: Params | None = None,
) -> Net:
    config = context.config
    return generalists.train(
        context,
        name,
        recipe(config, epochs),
        examples,
        loss=step_losses.top_k_distillation_loss(),
        variant={"temperature": 1.0, "hard_weight": config.distilled.hard_weight},
        start=start,
    )


def _trained_on_labels(context: Context, examples: Examples) -> Net:
    """The generalist, trained on as the distilled net is."""
    config = context.config
    if has_control(config):
        return nets.load(context.inputs["longer"] / "longer")
    return generalists.train(
        context,
        "on_labels",
        recipe(config, config.distilled.epochs),
        [examples] * len(config.seeds),
        start=generalists.load_all(context).params,
    )


def _teachers(context: Context) -> tuple[list[float], list[float]]:
    """Test accuracy of each seed's generalist, without and with its specialists, per cent."""
    config, data = context.config, load_data(context.config)
    before: list[float] = []
    after: list[float] = []
    for s in range(len(config.seeds)):
        generalist, found = generalists.load(context, s), training.load_stage(context, s)
        inputs, label = generalist.inputs(data.test["inputs"]), data.test["label"]
        q = training.predict(config, generalist, found, inputs)
        for values, predicted in ((before, generalist.net.logits(inputs)), (after, q)):
            values.append(100.0 * float((predicted.argmax(axis=-1) == label).mean()))
    return before, after


def _rows(
    config: ConfigDict,
    name: str,
    values: Sequence[float],
    teachers: tuple[Sequence[float], Sequence[float]],
    seconds: float = 0.0,
) -> list[Row]:
    table, (before, after) = "specialists_distilled", teachers
    rows = [make_row(config, table, name, "test_accuracy", values, seconds=seconds)]
    gain = np.array(after) - before  # of nothing there is no share
    if name != "generalist" and gain.all():
        kept = 100.0 * (np.array(values) - before) / gain
        rows.append(make_row(config, table, name, "gain_kept_percent", kept, seconds=seconds))
    return rows


def _progress(seed: int) -> Callable[[int, int], None]:
    begun = time.monotonic()

    def show(done: int, size: int) -> None:
        rate = done / (time.monotonic() - begun)
        print(f"soft targets, seed {seed}: {done}/{size} examples, {rate:.0f} a second", flush=True)

    return show
