"""Mistakes that a training tells of before it begins, or when it has finished."""

import jax
import numpy as np
import pytest
import tiny
from flax import linen as nn

from distill_jax import models, optimizers, step_losses, trainer
from distill_jax.errors import UserError

HYPER = {"learning_rate": 0.05, "temperature": 2.0, "hard_weight": 0.5}
N = 30


def train(directory, examples, loss=step_losses.label_loss, **options):
    recipe = trainer.Recipe(
        epochs=options.pop("epochs", 1),
        batch_size=8,
        optimizer=lambda steps, epochs: optimizers.sgd(lambda step: 1.0),
        transforms=options.pop("transforms", ()),
    )
    model = options.pop("model", models.mlp([4], tiny.CLASSES))
    more = {"keys": jax.random.split(jax.random.key(0), 1), "hyper": HYPER, **options}
    return trainer.train(directory, model, examples, loss, recipe, **more)


def with_labels(*labels):
    examples = tiny.examples(N)
    examples["label"][: len(labels)] = labels
    return examples


def test_a_label_beyond_the_classes_is_named_before_anything_is_trained(tmp_path):
    message = r"label 3 at row 1 \(id 101\); the model has 3 classes.*\(2 of 30 are beyond\)"
    with pytest.raises(UserError, match=f"net: {message}"):
        train(tmp_path, with_labels(-1, 3, 7))
    with pytest.raises(UserError, match=f"net, test_errors: {message}"):
        train(tmp_path, with_labels(), evaluation={"test_errors": with_labels(-1, 3, 7)})
    with pytest.raises(UserError, match="none of the 30 labels is known"):
        train(tmp_path, with_labels(), evaluation={"test_errors": with_labels(*[-1] * N)})
    assert not list(tmp_path.iterdir())
    ignored = {**with_labels(7), "label_known": np.arange(N) > 0}
    assert train(tmp_path / "net", ignored).history


def test_labels_of_a_stream_are_checked_block_by_block():
    sample = jax.ShapeDtypeStruct((4, 4), np.uint8)
    stream = trainer.Stream(iter, 2, 1, sample, lambda block, mesh: block, {}, lambda *_: None)
    put = trainer._checked(stream, tiny.CLASSES, "net").put
    blocks = [{"label": np.array([[0, -1], [last, 2]])} for last in (2, 3)]
    assert put(blocks[0], None) is blocks[0]
    with pytest.raises(UserError, match=r"net: label 3 at row \[1, 0\]; the model has 3"):
        put(blocks[1], None)


def test_a_field_of_another_length_is_not_gathered_from(tmp_path):
    examples = {**tiny.examples(N), "prior": np.ones(tiny.CLASSES, np.float32)}
    message = rf"a set of {N} examples, but 'prior' is \[3\]; expected \[{N}, ...\]"
    with pytest.raises(UserError, match=message):
        train(tmp_path, examples)


def test_soft_targets_need_no_labels(tmp_path):
    examples = {**tiny.examples(N), "teacher_logits": tiny.teacher_logits(N)}
    del examples["label"]
    held_out = {"test_errors": tiny.examples(12, seed=5)}
    net = train(tmp_path, examples, step_losses.distillation_loss, evaluation=held_out)
    record = net.member(0).history[-1]
    assert record["train_errors"] is None and 0 <= record["test_errors"] <= 12


class Normed(nn.Module):
    """A net with BatchNorm, whose statistics nobody keeps."""

    @nn.compact
    def __call__(self, images, train):
        x = 10 * images.reshape(len(images), -1) / 255 + 30
        return nn.Dense(tiny.CLASSES)(nn.BatchNorm(use_running_average=not train)(x))


def normed_apply(params, inputs, dropout_key=None):
    training = dropout_key is not None
    return Normed().apply(params, inputs, training, mutable=["batch_stats"])[0]


NORMED = models.Model(lambda key, inputs: Normed().init(key, inputs, False), normed_apply)
PLAIN = models.mlp([4], tiny.CLASSES, hidden_dropout=0.5)._replace(description="")


@pytest.mark.parametrize("model", [NORMED, PLAIN], ids=["BatchNorm", "dropout"])
def test_a_state_that_a_model_of_ones_own_loses_is_told(model, tmp_path, caplog):
    def shift(batch, key, constants):
        return {**batch, "inputs": batch["inputs"] + constants["shift"]}

    more = {"transforms": [shift], "constants": [{"shift": np.float32(1)}]}
    examples = tiny.examples(N)
    examples["inputs"] = examples["inputs"].astype(np.float32)
    train(tmp_path, examples, model=model, epochs=2, **more)
    assert ("evaluation mode, but was" in caplog.text) == (model is NORMED)
    assert ("BatchNorm" in caplog.text) == (model is NORMED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": lambda key, inputs: {"layers": [jax.numpy.ones(2)]}}, r"params\['layers'\]\[0\]"),
        (
            {"apply": lambda params, inputs, **_: (inputs, 1)},
            "what the model returns is of type tuple",
        ),
    ],
)
def test_models_that_no_net_can_have_are_told_before_the_training(change, message, tmp_path):
    own = {
        "apply": lambda params, inputs, **_: jax.numpy.ones((len(inputs), tiny.CLASSES)),
        **change,
    }
    with pytest.raises(UserError, match=message):
        train(tmp_path, tiny.examples(N), model=PLAIN._replace(**own))
    assert not list(tmp_path.iterdir())
