"""A mixture of experts with a learned gate, which section 7 holds specialists against.

    p(y | x) = sum over experts e of g_e(x) p_e(y | x)         (Jacobs, Jordan, Nowlan, Hinton 1991)

The experts have the specialists' form: the generalist's head on its frozen trunk, and start as copies of
it. The gate, a linear layer on the same features, starts at random, which makes the experts differ. All
learn from all examples at once. So the mixture has as many parameters as generalist and specialists, and
it may be trained for as long as they were.

It can't be cut into independent jobs. The gradient of an expert is weighted with its share of the
likelihood, g_e p_e(y) / sum_f g_f p_f(y), and so is the gate's: in every step each expert must send the
probability that it gives each example's label, and be sent its share. Specialists exchange nothing.
"""

import functools

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


def train_mixture(context: Context) -> list[Row]:
    """The mixture's accuracy, its cost, and what its experts exchange; nothing at 0 epochs."""
    config, data = context.config, load_data(context.config)
    if not config.mixture.epochs:
        return []
    name = f"mixture of {config.clusters.count} experts, from the generalist"
    measured: dict[str, list[float]] = {}
    seconds, rights = 0.0, []
    for s in range(len(config.seeds)):
        net = _train(context, s)
        seconds += net.seconds + generalists.training_inputs(context, s)[1]
        inputs_of = generalists.load(context, s).inputs
        for split, part in data.evaluation().items():
            predicted = net.logits(inputs_of(part["inputs"])).argmax(axis=-1)
            right = predicted == part["label"]
            measured.setdefault(split, []).append(100.0 * float(right.mean()))
            if split == "test":
                rights.append(right)
    comparison.keep(context, {name: rights})
    batch = config.mixture.batch_size
    steps = len(generalists.specialist_part(config)["id"]) // batch * config.mixture.epochs
    # A probability to the gate, and a share back, float32, of each expert and example.
    exchanged = {"steps": steps, "exchanged_bytes_per_step": 8 * batch * config.clusters.count}
    return control_rows(context, name, measured, seconds) + [
        row_of(config, name, metric, [value], seconds) for metric, value in exchanged.items()
    ]


def _train(context: Context, seed: int) -> Net:
    """The mixture of a seed's generalist."""
    config, count = context.config, context.config.clusters.count
    generalist, classes = generalists.load(context, seed), load_data(context.config).num_classes
    inputs, _ = generalists.training_inputs(context, seed)
    part = generalists.specialist_part(config)
    gate = models.mlp([], count, scaling=BYTE)
    model = mixture(training.build_network(config, generalist, classes), gate, count)
    keys = context.keys([config.seeds[seed]])
    copies = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (count, *leaf.shape)), generalist.net.params
    )
    start = {"experts": copies, "gate": gate.init(keys[0], jnp.asarray(inputs[:1]))}
    return common.train(
        ConfigDict({**config.to_dict(), "seeds": (config.seeds[seed],)}),
        ConfigDict({**config.generalist.to_dict(), **config.mixture.to_dict()}),
        model,
        [{**part, "inputs": inputs}],
        step_losses.label_loss,
        keys=keys,
        directory=context.directory / f"seed_{config.seeds[seed]}",
        name="mixture",
        start=jax.tree.map(lambda leaf: np.asarray(leaf)[None], start),
    ).member(0)
