"""Temperatures and weights that change with the step, and the teacher's own temperature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from distill_jax import losses, models, optimizers, ramps, step_losses, trainer
from distill_jax.errors import UserError

OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))
MODEL = models.mlp([4], tiny.CLASSES)
EXAMPLES = tiny.examples(8) | {"teacher_logits": tiny.teacher_logits(8)}
RECIPE = trainer.Recipe(epochs=3, batch_size=8, optimizer=lambda steps, epochs: OPTIMIZER)


def train(folder, hyper, count=1, **options):
    return trainer.train(
        folder,
        MODEL,
        EXAMPLES,
        step_losses.distillation_loss,
        RECIPE,
        keys=jnp.stack([jax.random.key(7)] * count),
        hyper={"learning_rate": 0.1, "hard_weight": 0.25, **hyper},
        **options,
    )


def test_a_ramp():
    ramp = {"from": jnp.float32(8), "to": jnp.float32(2), "steps": jnp.float32(3)}
    steps = [0, 1, 2, 3, 100]
    found = [ramps.at_step({"temperature": ramp}, jnp.int32(n))["temperature"] for n in steps]
    np.testing.assert_allclose(found, [8, 6, 4, 2, 2], rtol=1e-6)
    with pytest.raises(UserError, match="a number that changes has no steps"):
        ramps.at_step({"temperature": {"from": ramp["from"], "to": ramp["to"]}}, jnp.int32(0))


def test_ramps_of_members_are_those_of_nets_alone_and_of_a_function(tmp_path):
    """Two steps of an epoch each, so that the temperature of each step is known."""
    ramps = {"temperature": {"from": [4.0, 8.0], "to": [2.0, 2.0], "steps": [2, 4]}}
    both = train(tmp_path / "both", ramps, 2)
    for m, values in enumerate(((4.0, 3.0, 2.0), (8.0, 6.5, 5.0))):
        table = jnp.asarray(values)
        step_by_step = train(tmp_path / f"{m}", {"temperature": functools.partial(_entry, table)})
        own = both.member(m)
        tiny.assert_close(own.params, step_by_step.member(0).params)
        losses_of = [
            [r["train_loss"] for r in net.history] for net in (own, step_by_step.member(0))
        ]
        np.testing.assert_allclose(*losses_of, rtol=1e-5)
    constant = train(tmp_path / "constant", {"temperature": 4.0}).member(0)
    assert not np.allclose(
        constant.params["output"]["bias"], both.member(0).params["output"]["bias"]
    )


def _entry(table, step):
    return table[step]


def test_another_schedule_is_another_training(tmp_path):
    ramp = {"from": 4.0, "to": 2.0, "steps": 2}
    train(tmp_path, {"temperature": ramp})
    with pytest.raises(UserError, match=r"hyper.temperature.from is \[4.0\] there and \[5.0\] now"):
        train(tmp_path, {"temperature": ramp | {"from": 5.0}})


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ({"from": 4.0, "to": 0.0, "steps": 2}, "temperature.to is 0.0; allowed: above 0"),
        ({"from": 4.0, "to": 2.0, "steps": 0}, "temperature.steps is 0; allowed: a whole number"),
        ({"from": 4.0, "to": 2.0}, "expected a number, a function of the step, or from, to, steps"),
        ({"from": [4.0, 2.0], "to": 2.0, "steps": 2}, r"temperature.from \[2\] for 1 keys"),
    ],
)
def test_ramps_that_are_none(tmp_path, ramp, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, {"temperature": ramp})


def test_the_teacher_has_a_temperature_of_its_own():
    z, batch = jnp.asarray(tiny.teacher_logits(8, 5)), EXAMPLES
    v, labels = jnp.asarray(batch["teacher_logits"]), jnp.asarray(batch["label"])
    hyper = tiny.hyper(temperature=2.0, teacher_temperature=5.0)
    found = step_losses.distillation_loss(z, {**batch, "teacher_logits": v, "label": labels}, hyper)
    p = np.exp(np.float64(v) / 5)
    p /= p.sum(-1, keepdims=True)
    log_q = np.float64(z) / 2
    log_q -= np.log(np.exp(log_q).sum(-1, keepdims=True))
    hard = np.float64(losses.hard_cross_entropy(z, labels))
    np.testing.assert_allclose(found, -0.7 * 4 * (p * log_q).sum(-1) + 0.3 * hard, rtol=1e-5)
    given = {"teacher_logits": v, "label": labels, "labels": jnp.full(z.shape, -1)}
    modified = step_losses.label_modified_loss(z, given, hyper)
    np.testing.assert_allclose(
        modified, -4 * ((0.7 * p + 0.3 * np.eye(3)[labels]) * log_q).sum(-1), rtol=1e-5
    )
    found = step_losses.multi_label_distillation_loss(z, given, hyper)
    q = 1 / (1 + np.exp(-np.float64(v) / 5))
    yes, no = -np.logaddexp(0, -np.float64(z) / 2), -np.logaddexp(0, np.float64(z) / 2)
    np.testing.assert_allclose(found, -0.7 * 4 * (q * yes + (1 - q) * no).sum(-1), rtol=1e-5)
