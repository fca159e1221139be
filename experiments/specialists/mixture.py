"""A mixture of experts with a learned gate, which section 7 holds specialists against.

    p(y | x) = sum over experts e of g_e(x) p_e(y | x)         (Jacobs, Jordan, Nowlan, Hinton 1991)

The experts have the specialists' form, the generalist's head on its trunk, and there are as many. The
gate is a linear layer on the same features. All learn from all examples at once. Two are trained: one
from the generalist, as specialists are, with its frozen trunk and copies of its head, which come to
differ because the gate starts at random; for the time of specialists. And one from scratch, for the time
of both.

It can't be cut into independent jobs. The gradient of an expert is weighted with its share of the
likelihood, g_e p_e(y) / sum_f g_f p_f(y), and so is the gate's: in every step each expert must send the
probability that it gives each example's label, and be sent its share. Specialists exchange nothing.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import models, step_losses
from distill_jax.models import Model, Params
from distill_jax.nets import Net
from experiments.common import training as common
from experiments.common.study import Context, Row
from experiments.specialists import comparison, generalists, training
from experiments.specialists.controls import control_rows
from experiments.specialists.data import BYTE, load_data
from experiments.specialists.table3 import row_of


@functools.cache
def mixture(expert: Model, gate: Model, count: int) -> Model:
    """A model of so many experts of one kind.

    Its params are {"experts": the experts', each leaf `[count, ...]`, "gate": the gate's}; its logits
    are the log-probabilities of the mixture.

    Args:
        expert: gives logits `[B, C]`.
        gate: gives logits `[B, count]` for the same inputs.
        count: of experts.

    Examples:
        >>> model = mixture(models.mlp([4], 3), models.mlp([], 2), 2)
        >>> params = model.init(jax.random.key(0), jnp.zeros((1, 5)))
        >>> log_p = model.apply(params, jnp.ones((7, 5)))
        >>> log_p.shape, bool(jnp.allclose(jnp.exp(log_p).sum(axis=-1), 1))
        ((7, 3), True)
    """

    def init(key: Array, inputs: Array) -> Params:
        gate_key, *keys = jax.random.split(key, count + 1)
        experts = jax.vmap(expert.init, (0, None))(jnp.stack(keys), inputs)
        return {"experts": experts, "gate": gate.init(gate_key, inputs)}

    def apply(params: Params, inputs: Array, dropout_key: Array | None = None) -> Array:
        gates = jax.nn.log_softmax(gate.apply(params["gate"], inputs))
        logits = jax.vmap(expert.apply, (0, None, None))(params["experts"], inputs, dropout_key)
        joint = jax.nn.log_softmax(logits) + gates.T[:, :, None]
        return jax.nn.logsumexp(joint, axis=0)

    return Model(init, apply)


def mixtures(context: Context) -> list[Row]:
    """The mixtures' accuracy and cost, and what their experts exchange; none for those of 0 epochs."""
    config, rows = context.config, []
    kept: dict[str, list[np.ndarray]] = {}
    for start, epochs, train in (
        ("the generalist", config.mixture.epochs, _from_generalist),
        ("scratch", config.mixture.scratch_epochs, _from_scratch),
    ):
        if not epochs:
            continue
        name = f"mixture of {config.clusters.count} experts, from {start}"
        net = {**config.generalist.to_dict(), **config.mixture.to_dict(), "epochs": epochs}
        trained = [train(context, s, ConfigDict(net)) for s in range(len(config.seeds))]
        measured, kept[name] = _measure(context, trained)
        seconds = sum(one.seconds for one, _ in trained)
        rows += control_rows(context, name, measured, seconds)
        rows += _exchanged(config, name, epochs, seconds)
    if kept:
        comparison.keep(context, kept)
    return rows


_Inputs = Callable[[np.ndarray], np.ndarray]


def _measure(
    context: Context, trained: Sequence[tuple[Net, _Inputs]]
) -> tuple[dict[str, list[float]], list[np.ndarray]]:
    """Accuracies, per cent, by the name of the set `[seeds]`, and which test examples are right."""
    measured: dict[str, list[float]] = {}
    for split, part in load_data(context.config).evaluation().items():
        rights = [
            net.logits(inputs_of(part["inputs"])).argmax(axis=-1) == part["label"]
            for net, inputs_of in trained
        ]
        measured[split] = [100.0 * float(right.mean()) for right in rights]
        if split == "test":
            of_test = rights
    return measured, of_test


def _exchanged(config: ConfigDict, name: str, epochs: int, seconds: float) -> list[Row]:
    """Steps, and what they send: to the gate a probability, and back a share, each float32."""
    size, batch = len(generalists.specialist_part(config)["id"]), config.mixture.batch_size
    values = {
        "steps": size // batch * epochs,
        "exchanged_bytes_per_step": 8 * batch * config.clusters.count,
    }
    return [row_of(config, name, metric, [value], seconds) for metric, value in values.items()]


def _from_generalist(context: Context, seed: int, net: ConfigDict) -> tuple[Net, _Inputs]:
    """Experts that start as copies of a generalist, as specialists do; and what makes their inputs."""
    config, count = context.config, context.config.clusters.count
    generalist, classes = generalists.load(context, seed), load_data(context.config).num_classes
    inputs, seconds = generalists.training_inputs(context, seed)
    gate = models.mlp([], count, scaling=BYTE)
    model = mixture(training.build_network(config, classes), gate, count)
    copies = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (count, *leaf.shape)), generalist.net.params
    )
    key = context.keys([config.seeds[seed]])[0]
    start = {"experts": copies, "gate": gate.init(key, jnp.asarray(inputs[:1]))}
    found = _train(
        context, seed, "from_generalist", net=net, model=model, inputs=inputs, start=start
    )
    return found._replace(seconds=found.seconds + seconds), generalist.inputs


def _from_scratch(context: Context, seed: int, net: ConfigDict) -> tuple[Net, _Inputs]:
    """Experts and gate on a trunk of their own, all of which learn together."""
    count, classes = context.config.clusters.count, load_data(context.config).num_classes
    head = mixture(generalists.head_of(net, classes), models.mlp([], count), count)
    model = models.chain(generalists.trunk_of(net), head)
    inputs = generalists.specialist_part(context.config)["inputs"]
    found = _train(context, seed, "from_scratch", net=net, model=model, inputs=inputs)
    return found, lambda images: images


def _train(
    context: Context,
    seed: int,
    name: str,
    *,
    net: ConfigDict,
    model: Model,
    inputs: np.ndarray,
    start: Params | None = None,
) -> Net:
    """The mixture of one seed, on the examples of specialists; `start` without an axis of members."""
    config, number = context.config, context.config.seeds[seed]
    part = generalists.specialist_part(config)
    return common.train(
        config,
        net,
        model,
        [{**part, "inputs": inputs}],
        step_losses.label_loss,
        keys=context.keys([number]),
        seeds=[number],
        directory=context.directory / name / f"seed_{number}",
        name=f"mixture, {name}",
        start=jax.tree.map(lambda leaf: np.asarray(leaf)[None], start),
    ).member(0)
