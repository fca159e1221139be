"""Errors are counted a batch at a time, each example once, and the devices share each batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax import evaluator, models, sharding, trainer

MEMBERS = 2
MODEL = models.mlp([16], tiny.CLASSES)
EXAMPLES = tiny.examples(53) | {
    "label": np.where(np.arange(53) % 9, tiny.examples(53)["label"], -1)
}


@functools.cache
def variables():
    keys = jax.random.split(jax.random.key(3), MEMBERS)
    return jax.vmap(lambda key: MODEL.init(key, EXAMPLES["inputs"][:1]))(keys)


def expected(member, labels):
    one = jax.tree.map(lambda leaf: leaf[member], variables())
    predicted = np.asarray(MODEL.apply(one, jnp.asarray(EXAMPLES["inputs"]))).argmax(-1)
    return np.sum((predicted != labels) & (labels >= 0))


@pytest.mark.parametrize("vmapped", [True, False])
@pytest.mark.parametrize("batch_size", [1, 16, 53, 60])
def test_every_example_is_counted_once(batch_size, vmapped):
    """In whole batches, with a rest, and in one; labels that are shared, and each member's own."""
    count = evaluator.compile_errors(MODEL, trainer.PLAIN, batch_size, vmapped=vmapped)
    found = count(variables(), {}, EXAMPLES)
    wanted = [expected(m, EXAMPLES["label"]) for m in range(MEMBERS)]
    assert found.dtype == jnp.int32 and found.tolist() == wanted and min(wanted) > 0
    own = np.stack([EXAMPLES["label"], np.roll(EXAMPLES["label"], 1)])
    inputs = {"inputs": EXAMPLES["inputs"]}
    wanted = [expected(m, own[m]) for m in range(MEMBERS)]
    assert count(variables(), {"label": own}, inputs).tolist() == wanted
    assert wanted[0] != wanted[1]


def on_mesh(sizes, count, batch_size):
    """What counts errors of so many examples on a mesh, compiled; and its arguments."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    fields = {name: np.resize(field, (count, *field.shape[1:])) for name, field in EXAMPLES.items()}
    shared = sharding.put_examples(fields, mesh, dict.fromkeys(fields, False))
    states = sharding.init_members(lambda variables: variables, variables(), mesh)
    counted = evaluator.compile_errors(MODEL, trainer.PLAIN, batch_size, mesh)
    return counted.lower(states, {}, shared).compile(), (states, {}, shared)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (1, 2, 2)])
def test_devices_share_the_batches(sizes):
    """53 examples: one batch of 32, of the other 21 as many as can be shared, then what is left."""
    program, arguments = on_mesh(sizes, 53, 32)
    wanted = [expected(m, EXAMPLES["label"]) for m in range(MEMBERS)]
    assert program(*arguments).tolist() == wanted


def test_each_device_does_its_part():
    whole, split = (on_mesh(sizes, 64, 64)[0] for sizes in ((1, 1, 1), (1, 8, 1)))
    operations = [one.cost_analysis()["flops"] for one in (whole, split)]
    assert 0.1 < operations[1] / operations[0] < 0.2  # an eighth, and the sum over devices


def test_memory_is_of_a_batch():
    few, many = (on_mesh((1, 1, 1), count, 16)[0] for count in (64, 4096))
    temporary = [one.memory_analysis().temp_size_in_bytes for one in (few, many)]
    logits_and_activations = 4 * (16 + tiny.CLASSES) * 4032
    assert temporary[1] - temporary[0] < logits_and_activations / 10
