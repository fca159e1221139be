"""The train step with a loss that is fused with the output layer: the dense step, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill_jax import models, optimizers, sharding, soft_targets, step_losses, train_step
from distill_jax.epochs import make_epoch
from distill_jax.errors import UserError
from experiments.common import training
from experiments.common.config import net_section
from experiments.compiled.collectives import collectives

M, K = 3, 2
# LLVM's level, after XLA has split the work: programs that compile in half the time.
QUICK = {"xla_backend_optimization_level": 0}
CLASSES, BATCH = 48, 16
TEACHER = models.mlp((7,), CLASSES)
MODEL = models.mlp((24, 16), CLASSES, input_dropout=0.2, hidden_dropout=0.5)
OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0), max_norm=1.0)
TOP_K = step_losses.top_k_distillation_loss(np.linspace(1, 2, CLASSES))


def examples(count=48):
    random = np.random.default_rng(0)
    return {
        "id": np.arange(count, dtype=np.int32),
        "inputs": random.integers(0, 256, (count, 4, 4), np.uint8),
        "label": random.integers(-1, CLASSES, count).astype(np.int32),
        "teacher_ids": np.argsort(random.random((count, CLASSES)))[:, :K].astype(np.uint16),
        "teacher_probabilities": np.full((count, K), 0.25, jnp.bfloat16),
        "teacher_tail": np.full(count, 0.5, np.float32),
    }


def init(key):
    return train_step.init_state(MODEL, OPTIMIZER, key, jnp.zeros((1, 4, 4), jnp.uint8))


def two_losses(logits, batch, hyper, constants):
    known = {**batch, "label_known": batch["label"] >= 0}
    return step_losses.label_loss(logits, batch, hyper) + TOP_K(logits, known, hyper)


@functools.cache
def trained(sizes, fused):
    """Two members after an epoch on a mesh, the metrics, and the compiled program."""
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    mesh = Mesh(devices, sharding.AXES)
    loss = train_step.Fused(two_losses, 2, sharding.over_data(mesh)) if fused else two_losses
    step = train_step.make_train_step(MODEL, OPTIMIZER, loss)
    run_epoch = make_epoch(step, BATCH, shard_batch=sharding.shard_batch(mesh, BATCH))
    keys = jax.random.split(jax.random.key(5), 2)
    shared = dict.fromkeys(examples(), False)
    states = sharding.init_members(init, keys, mesh)
    placed = sharding.put_examples(examples(), mesh, shared)
    hyper = jax.tree.map(lambda x: jnp.stack([x, x / 2]), tiny.hyper())
    jitted = sharding.compile_epoch(run_epoch, mesh, shared)
    compiled = jitted.lower(states, placed, keys, hyper, {}).compile(QUICK)
    return jax.device_get(compiled(states, placed, keys, hyper, {})), collectives(
        compiled.as_text(), mesh
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_a_fused_step_is_the_dense_one_on_every_mesh(sizes):
    tiny.assert_close(trained(sizes, True)[0], trained((1, 1, 1), False)[0], rtol=1e-4, atol=1e-5)


def test_the_gradient_meets_once_and_logits_never():
    """The collectives of "data" are those of the dense step, however many chunks there are."""
    found, dense = (trained((1, 8, 1), fused)[1] for fused in (True, False))
    assert sorted(found) == sorted(dense)


@functools.partial(jax.jit, static_argnums=(0, 1))
def one_step(fused, micro_batches, state, batch, teachers):
    hidden = jax.vmap(lambda p, x: TEACHER.hidden(p, x), (0, None), 1)
    transform = train_step.online_teacher_hidden(hidden)
    loss = step_losses.hidden_teacher_loss("geometric")
    step = train_step.make_train_step(
        MODEL,
        OPTIMIZER,
        train_step.Fused(loss, 3) if fused else loss,
        transforms=[transform],
        micro_batches=micro_batches,
    )
    constants = {"teacher": teachers, "teacher_layer": teachers["output"]}
    return step(state, batch, jax.random.key(1), tiny.hyper(), constants)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_teachers_by_their_hidden_layers_are_online_teachers(micro_batches):
    batch = {name: field[:BATCH] for name, field in examples().items() if "teacher" not in name}
    batch["label"] = np.abs(batch["label"])
    keys = jax.random.split(jax.random.key(3), M)
    teachers = jax.vmap(lambda key: TEACHER.init(key, batch["inputs"]))(keys)
    state = init(jax.random.key(0))
    found = one_step(True, micro_batches, state, batch, teachers)
    tiny.assert_close(found, one_step(False, micro_batches, state, batch, teachers))
    logits = jax.vmap(TEACHER.apply, (0, None))(teachers, batch["inputs"])
    geometric = soft_targets.ensemble_logits(logits, 3.0, "geometric")
    # Added by a transform too, whose key makes the step's dropout another one.
    step = train_step.make_train_step(
        MODEL,
        OPTIMIZER,
        step_losses.distillation_loss,
        transforms=[lambda batch, key, constants: {**batch, "teacher_logits": geometric}],
        micro_batches=micro_batches,
    )
    expected = jax.jit(step)(state, batch, jax.random.key(1), tiny.hyper())
    tiny.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_does_not_tell_its_hidden_layer_is_refused():
    bare = models.Model(MODEL.init, MODEL.apply)
    with pytest.raises(UserError, match="without `hidden`"):
        train_step.make_train_step(bare, OPTIMIZER, train_step.Fused(step_losses.label_loss))


def test_a_batch_without_the_teachers_activations_says_how_to_get_them():
    batch = {"label": jnp.zeros(4, jnp.int32)}
    with pytest.raises(UserError, match=r"no teacher_hidden, only.*online_teacher_hidden"):
        step_losses.hidden_teacher_loss()(jnp.zeros((4, CLASSES)), batch, tiny.hyper())
    batch["teacher_hidden"] = jnp.zeros((4, 1, 2))
    with pytest.raises(UserError, match=r"the constants have no teacher_layer, only \[\]"):
        step_losses.hidden_teacher_loss()(jnp.zeros((4, CLASSES)), batch, tiny.hyper())


def test_the_hidden_layer_and_the_output_layer_are_the_model():
    trunk = models.conv_trunk((4,), (2,))
    chained = models.chain(trunk, MODEL)
    images, key = examples(5)["inputs"], jax.random.key(2)
    params = chained.init(key, images)
    hidden = chained.hidden(params, images, dropout_key=key)
    logits = hidden @ params["output"]["kernel"] + params["output"]["bias"][None]
    tiny.assert_close(logits, chained.apply(params, images, dropout_key=key))
    assert hidden.shape == (5, 16) and trunk.hidden is None


@pytest.mark.parametrize("batch_logits", [0, BATCH * CLASSES, BATCH * CLASSES + 1])
def test_a_study_fuses_the_loss_of_batches_with_many_logits(batch_logits, tmp_path):
    seen = []

    def loss(logits, batch, hyper, constants):
        seen.append(logits.shape)
        return two_losses(logits, batch, hyper, constants)

    net = ConfigDict(
        net_section(
            hidden=(8,), epochs=1, batch_size=BATCH, optimizer="sgd", fused_logits=batch_logits
        )
    )
    mesh = {"member": 1, "data": -1, "model": 1}
    config = ConfigDict({"seeds": (0,), "selection": "last", "mesh": mesh})
    model = training.build_model(net, CLASSES)
    variant = {"temperature": 2.0, "hard_weight": 0.5}
    with jax.numpy_dtype_promotion("standard"):  # for optax's schedules
        training.train(
            config,
            net,
            model,
            [examples()],
            loss,
            keys=jax.random.split(jax.random.key(0), 1),
            directory=tmp_path,
            name="net",
            variants=[variant],
        )
    # One of 8 devices sees its own examples of a fused loss; all see the whole batch of a dense one.
    fused = batch_logits == BATCH * CLASSES
    assert set(seen) == {(BATCH // 8 if fused else BATCH, CLASSES)}
