"""Epochs that draw rows of their own: the enriched batches of specialists, alone and together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh

from distill_jax import models, optimizers, sharding, step_losses, train_step
from distill_jax.epochs import ROWS, make_epoch, make_one_step, make_order
from distill_jax.errors import UserError
from distill_jax.specialists import enrichment, heads
from distill_jax.train_step import TrainState

N, C, BATCH, MEMBERS = 70, 9, 8, 4
SETS = np.array([[1, 4, 7], [6, 7, 8], [0, 8, C], [2, 3, 5]], np.int32)
MODEL = models.mlp([8], SETS.shape[1] + 1, hidden_dropout=0.5)
OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))
LEARNING_RATES = jnp.array([0.1, 0.02, 0.2, 0.1])


def make_fields():
    """What all share, and of each specialist its rows and labels `[M, ...]`."""
    random = np.random.default_rng(2)
    drawn = random.choice(C, N - C, p=np.arange(1, C + 1) / 45)
    labels = np.append(np.arange(C), drawn).astype(np.int32)
    shared = {"inputs": tiny.examples(N)["inputs"], "label": labels}
    own = {
        **enrichment.stack_rows([enrichment.enriched_rows(labels, s, C) for s in SETS]),
        "targets": np.stack([heads.dustbin_labels(jnp.asarray(s), C) for s in SETS]),
    }
    return {**shared, **own}, {**dict.fromkeys(shared, False), **dict.fromkeys(own, True)}


FIELDS, PER_MEMBER = make_fields()


def of_member(m):
    return {
        name: jnp.asarray(field[m] if PER_MEMBER[name] else field) for name, field in FIELDS.items()
    }


def size(fields):
    """As in the study: twice the special half, of the specialist that has most."""
    return 2 * fields["special"].shape[-1]


STEPS = size(FIELDS) // BATCH


def gather(fields, rows):
    label = fields["targets"][fields["label"][rows]]
    return {"inputs": fields["inputs"][rows], "label": label, "row": rows}


def make(step, batch_size=BATCH, passes=1, shard_batch=lambda batch: batch):
    return make_epoch(
        step,
        batch_size,
        passes=passes,
        shard_batch=shard_batch,
        gather=gather,
        draw=enrichment.draw_enriched,
        size=size,
    )


def seen_step(state, batch, key, hyper, constants):
    """Trains nothing; its metrics are what it was handed."""
    return state._replace(step=state.step + 1), {"row": batch["row"], "label": batch["label"]}


SEEN = {passes: jax.jit(make(seen_step, passes=passes)) for passes in (1, 2)}


def look(key, member, first_step=0, passes=1):
    """The state, and the rows and labels `[passes * STEPS, BATCH]` of a specialist's batches."""
    state = TrainState(jnp.int32(first_step), {}, ())
    state, seen = SEEN[passes](state, of_member(member), key, {})
    return state, {name: np.asarray(field).reshape(-1, BATCH) for name, field in seen.items()}


def test_single_steps_are_those_of_the_epoch(key):
    """Two epochs step by step see the rows of two epochs as one program."""
    order = jax.jit(make_order(BATCH, draw=enrichment.draw_enriched, size=size))
    step = jax.jit(make_one_step(seen_step, gather=gather))
    state, found = TrainState(jnp.int32(0), {}, ()), []
    after, expected = SEEN[2](state, of_member(1), key, {})
    while state.step < after.step:
        _, rows = order(state, of_member(1), key, {})
        for _ in range(len(rows)):
            state, seen = step(state, {**of_member(1), ROWS: rows}, key, {})
            found.append(seen["row"])
    np.testing.assert_array_equal(np.ravel(found), expected["row"])
    assert state.step == after.step


def test_an_epoch_is_as_long_as_its_size_says(key):
    longest = 2 * max(FIELDS["special_count"])
    assert min(FIELDS["special_count"]) < longest // 2 and longest % BATCH
    for member in range(MEMBERS):
        state, seen = look(key, member)
        assert state.step == longest // BATCH == len(seen["row"])


@pytest.mark.parametrize("member", range(MEMBERS))
def test_every_batch_and_every_even_part_of_it_is_half_special(key, member):
    _, seen = look(key, member, passes=2)
    inside = np.isin(FIELDS["label"][seen["row"]], SETS[member])
    for part in np.split(inside, 4, axis=1):  # as four devices have it
        assert (part.sum(axis=1) == 1).all()
    targets = FIELDS["targets"][member][FIELDS["label"][seen["row"]]]
    np.testing.assert_array_equal(seen["label"], targets)
    assert ((targets < SETS.shape[1]) == inside).all()


def test_rows_are_a_function_of_key_and_epoch(key):
    state, both = look(key, 0, passes=2)
    assert state.step == 2 * STEPS
    _, first = look(key, 0)
    _, second = look(key, 0, first_step=STEPS)  # as after a resumption
    tiny.assert_equal(both["row"], np.concatenate([first["row"], second["row"]]))
    assert np.any(first["row"] != second["row"])
    assert np.any(first["row"] != look(jax.random.key(1), 0)[1]["row"])


def test_a_batch_larger_than_the_size_is_named(key):
    count = size(FIELDS)
    assert count != N  # it is the size that counts
    with pytest.raises(
        UserError, match=f"batch_size {count + 2} is more than the {count} examples"
    ):
        make(seen_step, count + 2)(TrainState(jnp.int32(0), {}, ()), of_member(0), key, {})


def keys():
    return jax.random.split(jax.random.key(5), MEMBERS)


@jax.jit
def init(key):
    return train_step.init_state(MODEL, OPTIMIZER, key, jnp.zeros((1, 4, 4), jnp.uint8))


STEP = train_step.make_train_step(MODEL, OPTIMIZER, step_losses.label_loss)
ALONE = jax.jit(make(STEP))


@functools.cache
def train_alone(member):
    """Two epochs: the state after each, and its metrics."""
    key = keys()[member]
    state, history = init(key), []
    for _ in range(2):
        hyper = {"learning_rate": LEARNING_RATES[member]}
        state, metrics = ALONE(state, of_member(member), key, hyper)
        history.append(jax.device_get((state, metrics)))
    return history


def compiled(mesh):
    run_epoch = make(STEP, shard_batch=sharding.shard_batch(mesh, BATCH))
    return sharding.compile_epoch(run_epoch, mesh, PER_MEMBER)


def mesh_of(member, data):
    devices = np.array(jax.devices()[: member * data]).reshape(member, data, 1)
    return Mesh(devices, sharding.AXES)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (2, 4), (4, 2)], ids=str)
def test_a_specialist_is_the_one_trained_alone(sizes):
    mesh = mesh_of(*sizes)
    run_epoch, states = compiled(mesh), sharding.init_members(init, keys(), mesh)
    examples = sharding.put_examples(FIELDS, mesh, PER_MEMBER)
    rows = examples["special"]
    assert rows.sharding.shard_shape(rows.shape)[0] == MEMBERS // sizes[0]
    assert examples["inputs"].sharding.is_fully_replicated
    for epoch in range(2):
        states, metrics = run_epoch(states, examples, keys(), {"learning_rate": LEARNING_RATES}, {})
        assert metrics["loss"].shape == (MEMBERS, STEPS)
        for member in range(MEMBERS):
            found = jax.tree.map(lambda leaf, m=member: np.asarray(leaf)[m], (states, metrics))
            state, sums = train_alone(member)[epoch]
            tiny.assert_close(found[0].params, state.params, rtol=0, atol=1e-6)
            tiny.assert_close(found[1], sums)
            assert found[0].step == state.step == (epoch + 1) * STEPS


def test_a_resumed_run_is_the_uninterrupted_one():
    mesh = mesh_of(2, 2)
    run_epoch = compiled(mesh)
    examples = sharding.put_examples(FIELDS, mesh, PER_MEMBER)

    def go_on(states, epochs):
        for _ in range(epochs):
            states, _ = run_epoch(states, examples, keys(), {"learning_rate": LEARNING_RATES}, {})
        return jax.device_get(states)

    whole = go_on(sharding.init_members(init, keys(), mesh), 3)
    saved = go_on(sharding.init_members(init, keys(), mesh), 1)
    tiny.assert_equal(go_on(jax.device_put(saved), 2), whole)
    assert np.any(saved.params["output"]["kernel"] != whole.params["output"]["kernel"])


def test_one_specialist_by_itself_is_a_member_too():
    """One member isn't vmapped; its fields have a leading axis all the same."""
    mesh = mesh_of(1, 1)
    own = {name: field[2:3] if PER_MEMBER[name] else field for name, field in FIELDS.items()}
    states, _ = compiled(mesh)(
        sharding.init_members(init, keys()[2:3], mesh),
        sharding.put_examples(own, mesh, PER_MEMBER),
        keys()[2:3],
        {"learning_rate": LEARNING_RATES[2:3]},
        {},
    )
    found = jax.tree.map(lambda leaf: np.asarray(leaf)[0], states.params)
    tiny.assert_close(found, train_alone(2)[0][0].params, rtol=0, atol=1e-6)


def test_micro_batches_of_enriched_batches_train_the_same():
    """Without dropout, whose masks would be others."""
    plain = models.mlp([8], SETS.shape[1] + 1)
    state = init(jax.random.key(1))
    hyper = {"learning_rate": jnp.float32(0.1)}
    found = [
        jax.jit(
            make(
                train_step.make_train_step(
                    plain, OPTIMIZER, step_losses.label_loss, micro_batches=m
                )
            )
        )(state, of_member(1), jax.random.key(0), hyper)
        for m in (1, 2)
    ]
    tiny.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
