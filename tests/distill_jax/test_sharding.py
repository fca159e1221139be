"""One device, eight devices, pmap and vmapped members all train the same nets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh

from distill_jax import models, optimizers, sharding, step_losses, train_step
from distill_jax.data.augment import jitter
from distill_jax.epochs import make_epoch
from distill_jax.errors import UserError

OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0), max_norm=2.0)
PLAIN = models.mlp([8], tiny.CLASSES)
DROPOUT = models.mlp([8], tiny.CLASSES, input_dropout=0.2, hidden_dropout=0.5)
N, BATCH, MEMBERS = 40, 16, 4


def one_device_mesh():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)


def make_batch(count=BATCH, teacher=True):
    fields = tiny.examples(count)
    if teacher:
        fields["teacher_logits"] = tiny.teacher_logits(count)
    return {name: jnp.asarray(field) for name, field in fields.items()}


@functools.partial(jax.jit, static_argnums=1)
def init(key, model=DROPOUT):
    return train_step.init_state(model, OPTIMIZER, key, jnp.zeros((1, 4, 4), jnp.uint8))


def run_steps(step, model, batch, steps=5):
    state, sums = init(jax.random.key(3), model), []
    for _ in range(steps):
        state, metrics = step(state, batch, jax.random.key(0), tiny.hyper(), {"teacher": {}})
        sums.append(jax.device_get(metrics))
    return jax.device_get(state), sums


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 8, 1)),
        ({"member": 2}, (2, 4, 1)),
        ({"member": -1, "data": 2, "model": 2}, (2, 2, 2)),
        ({"data": 1, "model": -1}, (1, 1, 8)),
        ({"member": 4, "data": 2}, (4, 2, 1)),
    ],
)
def test_mesh_takes_all_devices(sizes, shape):
    mesh = sharding.make_mesh(**sizes)
    assert mesh.axis_names == ("member", "data", "model")
    assert mesh.devices.shape == shape and set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    "sizes",
    [
        {"member": 3},
        {"member": 2, "data": 2},
        {"member": -1, "data": -1},
        {"member": 0},
        {"member": -2, "data": -4},
        {"member": 16, "data": 1},
    ],
)
def test_mesh_that_does_not_fit(sizes):
    asked = {"member": 1, "data": -1, "model": 1, **sizes}
    with pytest.raises(UserError) as error:
        sharding.make_mesh(**sizes)
    assert str(error.value) == f"mesh {asked} doesn't fit the 8 devices"


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "model": 4}])
def test_one_device_equals_eight(sizes):
    # With dropout and jitter: the randomness doesn't depend on the devices either.
    transforms = [
        jitter(1),
        train_step.online_teacher(
            lambda _, x: x.reshape(len(x), -1)[:, :3].astype(jnp.float32) / 99
        ),
    ]
    step = train_step.make_train_step(
        DROPOUT, OPTIMIZER, step_losses.distillation_loss, transforms=transforms
    )
    batch = make_batch(teacher=False)
    one, eight = (
        run_steps(sharding.compile_step(step, mesh, init(jax.random.key(0))), DROPOUT, batch)
        for mesh in (one_device_mesh(), sharding.make_mesh(**sizes))
    )
    tiny.assert_close(eight, one)


def test_step_is_spread_over_the_mesh_and_donates(key):
    mesh = sharding.make_mesh()
    step = train_step.make_train_step(DROPOUT, OPTIMIZER, step_losses.distillation_loss)
    compiled = sharding.compile_step(step, mesh, init(key))
    state, _ = compiled(init(key), make_batch(), key, tiny.hyper(), None)
    kernel = state.params["hidden_0"]["kernel"]
    assert kernel.sharding.is_fully_replicated and len(kernel.devices()) == 8
    compiled(state, make_batch(), key, tiny.hyper(), None)
    assert kernel.is_deleted()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_jit_equals_pmap(micro_batches):
    def make(axis_name):
        return train_step.make_train_step(
            PLAIN,
            OPTIMIZER,
            step_losses.distillation_loss,
            micro_batches=micro_batches,
            axis_name=axis_name,
        )

    jitted = sharding.compile_step(make(None), sharding.make_mesh(), init(jax.random.key(0), PLAIN))
    mapped = sharding.compile_pmap_step(make("data"))
    found, expected = (run_steps(step, PLAIN, make_batch()) for step in (mapped, jitted))
    tiny.assert_close(found, expected)


def test_pmap_replicas_draw_their_own_masks(key):
    step = sharding.compile_pmap_step(
        train_step.make_train_step(DROPOUT, OPTIMIZER, lambda z, *_: z[:, 0], axis_name="data")
    )
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), make_batch(8))
    _, metrics = step(init(key), same, key, tiny.hyper())
    dropped = train_step.make_train_step(DROPOUT, OPTIMIZER, lambda z, *_: z[:, 0])
    one = jax.tree.map(lambda x: x[:1], same)
    losses = [
        dropped(init(key), one, jax.random.key(seed), tiny.hyper())[1]["loss"] for seed in (0, 1)
    ]
    assert losses[0] != losses[1]  # so equal masks would give 8 times one replica's loss
    values = [
        float(
            DROPOUT.apply(
                init(key).params,
                one["inputs"],
                dropout_key=jax.random.split(
                    jax.random.fold_in(jax.random.fold_in(key, 0), replica), 1
                )[0],
            )[0, 0]
        )
        for replica in range(8)
    ]
    assert len(set(values)) > 4
    np.testing.assert_allclose(metrics["loss"], sum(values), rtol=1e-5)


SWEEP = {
    "learning_rate": jnp.array([0.1, 0.02, 0.3, 0.1]),
    "temperature": jnp.array([1.0, 3.0, 20.0, 3.0]),
    "hard_weight": jnp.array([0.0, 0.3, 0.5, 1.0]),
}


def member_targets():
    return np.stack([tiny.teacher_logits(N, seed) for seed in range(MEMBERS)])


def train_members(mesh, own_targets, loss=step_losses.distillation_loss, calls=2):
    targets = member_targets()
    fields = {**tiny.examples(N), "teacher_logits": targets if own_targets else targets[0]}
    per_member = {name: name == "teacher_logits" and own_targets for name in fields}
    step = train_step.make_train_step(DROPOUT, OPTIMIZER, loss)
    run_epoch = make_epoch(step, BATCH, passes=2, shard_batch=sharding.shard_batch(mesh, BATCH))
    compiled = sharding.compile_epoch(run_epoch, mesh, per_member)
    keys = jax.random.split(jax.random.key(5), MEMBERS)
    states = sharding.init_members(init, keys, mesh)
    examples = sharding.put_examples(fields, mesh, per_member)
    hyper, history = SWEEP, []
    for _ in range(calls):
        states, metrics = compiled(states, examples, keys, hyper, {})
        history.append(jax.device_get(metrics))
        hyper = jax.tree.map(lambda x: x * 0.9, hyper)
    return states, history


ALONE = jax.jit(
    make_epoch(
        train_step.make_train_step(DROPOUT, OPTIMIZER, step_losses.distillation_loss),
        BATCH,
        passes=2,
    )
)


@functools.cache
def train_alone(member, own_targets):
    targets = member_targets()[member if own_targets else 0]
    examples = {**tiny.examples(N), "teacher_logits": targets}
    examples = {name: jnp.asarray(field) for name, field in examples.items()}
    key = jax.random.split(jax.random.key(5), MEMBERS)[member]
    state, history = init(key), []
    hyper = jax.tree.map(lambda x: x[member], SWEEP)
    for _ in range(2):
        state, metrics = ALONE(state, examples, key, hyper)
        history.append(jax.device_get(metrics))
        hyper = jax.tree.map(lambda x: x * 0.9, hyper)
    return state, history


def pick(tree, member):
    return jax.tree.map(lambda x: np.asarray(x)[member], jax.device_get(tree))


@pytest.mark.parametrize("own_targets", [False, True])
@pytest.mark.parametrize("sizes", [None, {"member": 2, "data": 4}, {"member": 4, "data": 2}])
def test_a_member_is_the_net_trained_alone(sizes, own_targets):
    mesh = one_device_mesh() if sizes is None else sharding.make_mesh(**sizes)
    states, history = train_members(mesh, own_targets)
    assert history[0]["loss"].shape == (MEMBERS, 4)
    kernel = states.params["hidden_0"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == MEMBERS // mesh.shape["member"]
    for member in range(MEMBERS):
        found = pick((states, history), member)
        # Eight steps; the members' rounding differs with the order of their sums.
        tiny.assert_close(found, train_alone(member, own_targets), rtol=1e-4, atol=1e-5)


def test_members_are_traced_once():
    traces = []

    def loss(logits, batch, hyper, constants):
        traces.append(1)
        return step_losses.distillation_loss(logits, batch, hyper)

    train_members(sharding.make_mesh(2, 4), True, loss, calls=3)
    assert len(traces) == 1


def test_put_examples_splits_what_is_the_members_own():
    mesh = sharding.make_mesh(2, 4)
    fields = {"inputs": np.ones((6, 2)), "teacher_logits": np.ones((4, 6, 3), np.float32)}
    placed = sharding.put_examples(fields, mesh, {"inputs": False, "teacher_logits": True})
    assert placed["inputs"].sharding.is_fully_replicated
    targets = placed["teacher_logits"]
    assert targets.sharding.shard_shape(targets.shape) == (2, 6, 3)


def test_what_does_not_divide_is_named(key):
    mesh = sharding.make_mesh(2, 4)
    with pytest.raises(UserError, match=r"batch_size is 10, which .* over 4 data devices"):
        sharding.shard_batch(mesh, 10)
    with pytest.raises(UserError, match=r"number of members is 3, .* over 2 member devices"):
        sharding.init_members(init, jax.random.split(key, 3), mesh)
    step = train_step.make_train_step(PLAIN, OPTIMIZER, step_losses.label_loss, axis_name="data")
    with pytest.raises(UserError, match=r"batch size is 12, which doesn't divide over 8 devices"):
        sharding.compile_pmap_step(step)(init(key, PLAIN), make_batch(12), key, tiny.hyper())
