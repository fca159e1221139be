"""Inputs that are trees of arrays: trained on, evaluated, digested, kept and read again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from distill_jax import load_net, models, optimizers, sharding, soft_targets, step_losses, trainer
from distill_jax.errors import UserError

OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))
VOCABULARY, WIDTH, LENGTH = 11, 4, 6


def _init(key, inputs):
    return {
        "embedding": {"kernel": jax.random.normal(key, (VOCABULARY, WIDTH))},
        "output": {
            "kernel": jnp.ones((WIDTH, tiny.CLASSES)) * 0.1,
            "bias": jnp.zeros(tiny.CLASSES),
        },
    }


def _apply(params, inputs, dropout_key=None):
    """The mean embedding of the tokens that the mask has, and a softmax layer."""
    mask = inputs["mask"].astype(jnp.float32)[..., None]
    embedded = params["embedding"]["kernel"][inputs["tokens"]]
    pooled = jnp.sum(embedded * mask, 1) / jnp.maximum(jnp.sum(mask, 1), 1.0)
    return jnp.dot(pooled, params["output"]["kernel"]) + params["output"]["bias"][None]


BAG = models.Model(_init, _apply)


def examples(count):
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY, (count, LENGTH)).astype(np.int32)
    return {
        "id": np.arange(count),
        "inputs": {
            "tokens": tokens,
            "mask": np.arange(LENGTH)[None] < random.integers(1, 7, (count, 1)),
        },
        "label": random.integers(0, tiny.CLASSES, count).astype(np.int32),
    }


def train(folder, fields, loss=step_losses.label_loss, **options):
    recipe = trainer.Recipe(
        epochs=2, batch_size=16, micro_batches=2, optimizer=lambda steps, epochs: OPTIMIZER
    )
    return trainer.train(
        folder,
        BAG,
        fields,
        loss,
        recipe,
        keys=jax.random.split(jax.random.key(0), 2),
        hyper={"learning_rate": 0.1, "temperature": 2.0, "hard_weight": 0.2},
        evaluation={"test_errors": fields},
        **options,
    )


def test_teacher_soft_targets_student(tmp_path):
    fields = examples(32)
    teacher = train(tmp_path / "teacher", fields).member(0)
    again = load_net(tmp_path / "teacher", model=BAG)
    logits = again.logits(fields["inputs"], batch_size=10)
    direct = BAG.apply(teacher.params, jax.tree.map(jnp.asarray, fields["inputs"]))
    np.testing.assert_allclose(logits, direct, rtol=1e-5, atol=1e-6)

    digests = soft_targets.digests(fields["inputs"])
    soft_targets.write(tmp_path / "soft", logits, digests, teacher=teacher.fingerprint)
    joined = soft_targets.attach(fields, soft_targets.load(tmp_path / "soft"))
    student = train(tmp_path / "student", joined, step_losses.distillation_loss)
    on_a_mesh = train(
        tmp_path / "mesh", joined, step_losses.distillation_loss, mesh=sharding.make_mesh(2, 4, 1)
    )
    tiny.assert_close(student.params, on_a_mesh.params)

    other = {**fields["inputs"], "mask": ~fields["inputs"]["mask"]}
    with pytest.raises(UserError, match="are not the inputs that teacher"):
        soft_targets.attach({**fields, "inputs": other}, soft_targets.load(tmp_path / "soft"))
    with pytest.raises(UserError, match=r"inputs are .*'tokens': \[5\].* trained on .*\[6\]"):
        again.logits(jax.tree.map(lambda x: x[:, :5], fields["inputs"]))


def test_a_leaf_of_another_length(tmp_path):
    fields = examples(32)
    short = {**fields["inputs"], "mask": fields["inputs"]["mask"][:30]}
    with pytest.raises(UserError, match=r"inputs/mask' is \[30, 6\]; expected \[32, ...\]"):
        train(tmp_path, {**fields, "inputs": short})
    with pytest.raises(
        UserError, match=r"inputs/tokens is int32 \(32, 6\); expected any N \*, where N is 30"
    ):
        soft_targets.digests(short)
