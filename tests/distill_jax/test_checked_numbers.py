"""Numbers that are none are named where the library is given them, and traced ones pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from distill_jax import (
    epochs,
    fused_loss,
    losses,
    models,
    optimizers,
    step_losses,
    train_step,
    trainer,
)
from distill_jax.data import augment
from distill_jax.errors import UserError
from distill_jax.specialists import clustering, enrichment

CONSTANT = optax.constant_schedule(1.0)
Z = jnp.zeros((2, 3))
HIDDEN = {"hidden": jnp.ones((2, 4)), "layer": {"kernel": jnp.ones((4, 3))}}
WRONG = {
    "temperature is -1": lambda: losses.softmax(Z, -1),
    "temperature is 0.0": lambda: losses.soft_cross_entropy(Z, Z, 0.0),
    "hard_weight is 1.5": lambda: losses.distillation(Z, Z, None, 1.0, 1.5),
    "weight is -1": lambda: losses.label_modified(Z, jnp.zeros(2, int), -1),
    "temperature is nan": lambda: clustering.prediction_covariance([Z], float("nan")),
    r"hidden is \(0,\)": lambda: models.mlp([0], 3),
    "num_classes is 0": lambda: models.mlp([], 0),
    "input_dropout is 1.0": lambda: models.mlp([], 3, input_dropout=1.0),
    "the unit of scaling is 0": lambda: models.mlp([], 3, scaling=(0, 0)),
    r"channels is \(0,\)": lambda: models.conv_trunk([0], [2]),
    "the dropout rate is -0.5": lambda: models.dropout(jax.random.key(0), Z, -0.5),
    "momentum is 1.5": lambda: optimizers.sgd(CONSTANT, momentum=1.5),
    "max_norm is -1": lambda: optimizers.adam(CONSTANT, max_norm=-1),
    "steps_per_epoch is 0": lambda: optimizers.dropout_2012(0),
    "warmup_steps is 10": lambda: optimizers.cosine(10, 10),
    "the pixels of jitter is 1.5": lambda: augment.jitter(1.5),
    "micro_batches is 0": lambda: train_step.make_train_step(
        models.mlp([], 3), optimizers.sgd(CONSTANT), step_losses.label_loss, micro_batches=0
    ),
    "rows of a chunk is 0": lambda: fused_loss.mean_loss(
        lambda z, fields, constants: z[:, 0], **HIDDEN, fields={}, constants=None, rows=0
    ),
    "passes is 0": lambda: epochs.make_epoch(lambda *_: None, 4, passes=0),
    "batch_size is 0": lambda: epochs.steps_per_epoch(4, 0),
    "report_every is 0": lambda: trainer.Recipe(epochs=1, batch_size=2, report_every=0),
    "num_special is 0": lambda: enrichment.dustbin_correction(np.array([3, 0]), np.array([1, 1])),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_number_that_is_not_allowed(message):
    with pytest.raises(UserError, match=rf"^{message}; allowed: "):
        WRONG[message]()


def test_traced_numbers_pass():
    def loss(temperature, weight):
        return jnp.sum(losses.distillation(Z, Z, None, temperature, weight))

    assert np.isfinite(jax.jit(jax.grad(loss))(-2.0, 3.0))


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"temperature": [2.0, 0.0]}, r"temperature is 0.0; allowed: above 0"),
        ({"hard_weight": np.float32(2)}, "hard_weight is 2.0; allowed"),
        ({"own": float("inf")}, "own is inf; allowed: a finite number"),
        ({"own": [1.0, 2.0, 3.0]}, r"hyper has own \[3\] for 2 keys"),
    ],
)
def test_numbers_that_a_training_is_given(tmp_path, hyper, message):
    recipe, keys = trainer.Recipe(epochs=1, batch_size=8), jax.random.split(jax.random.key(0), 2)
    hyper = {"learning_rate": 0.1, **hyper}
    model, examples = models.mlp([], tiny.CLASSES), tiny.examples(8)

    def train(**options):
        trainer.train(
            tmp_path, model, examples, step_losses.label_loss, recipe, keys=keys, **options
        )

    with pytest.raises(UserError, match=message):
        train(hyper=hyper)
    with pytest.raises(UserError, match="selection is 'best'; allowed: 'last' or 'validation'"):
        train(hyper={"learning_rate": 0.1}, selection="best")
    assert not list(tmp_path.iterdir())


def test_numbers_that_a_step_lacks():
    batch = {**tiny.examples(4), "teacher_logits": tiny.teacher_logits(4)}
    with pytest.raises(UserError, match=r"hyper has no hard_weight, only \['temperature'\]"):
        step_losses.distillation_loss(jnp.zeros((4, 3)), batch, {"temperature": jnp.float32(1)})


def test_layers_of_one_name_in_trunk_and_head():
    model = models.mlp([3], 2)
    with pytest.raises(UserError, match="both have a layer named 'hidden_0'"):
        jax.eval_shape(models.chain(model, model).init, jax.random.key(0), jnp.zeros((1, 4)))
