"""The trainer: members as one program, resumed, saved when finished, and then read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax import models, nets, optimizers, train_step, trainer
from distill_jax.errors import UserError

MODEL = models.mlp([8], tiny.CLASSES)
RECIPE = trainer.Recipe(epochs=4, batch_size=8)
N = 30
KEYS = jax.random.split(jax.random.key(3), 2)
HYPER = {"learning_rate": [0.01, 0.02]}


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # for optax's schedules
        yield


def train(directory, recipe=RECIPE, keys=KEYS, hyper=HYPER, **options):
    return trainer.train(
        directory,
        options.pop("model", MODEL),
        options.pop("examples", tiny.examples(N)),
        options.pop("loss", train_step.label_loss),
        recipe,
        keys=keys,
        hyper=hyper,
        **{"config": {"hidden": (8,)}, **options},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        folder = tmp_path_factory.mktemp("trained")
        return folder, train(folder, evaluation={"test_errors": tiny.examples(12, seed=5)})


def test_a_finished_training_is_read_and_not_repeated(trained, monkeypatch):
    folder, net = trained
    monkeypatch.setattr(trainer.loop, "fit", None)
    again = train(folder, evaluation={"test_errors": tiny.examples(12, seed=5)})
    tiny.assert_equal(again.params, net.params)
    assert again.history == net.history and again.seconds == net.seconds
    assert again.model is MODEL and again.members == 2
    assert [record["epoch"] for record in net.history] == [1, 2, 3, 4]
    assert np.shape(net.history[-1]["test_errors"]) == (2,)


def test_another_training_in_its_folder_is_refused(trained):
    folder, _ = trained
    with pytest.raises(UserError, match=r"hidden is \[8\] there and \[9\] now"):
        train(folder, config={"hidden": (9,)})
    with pytest.raises(UserError, match="members is 2 there and 1 now"):
        train(folder, keys=KEYS[:1], hyper={"learning_rate": 0.01})


def test_a_member_is_the_net_that_is_trained_alone(trained, tmp_path):
    _, net = trained
    for m in range(2):
        alone = train(
            tmp_path / str(m),
            keys=KEYS[m : m + 1],
            hyper={"learning_rate": HYPER["learning_rate"][m]},
        )
        tiny.assert_close(alone.member(0).params, net.member(m).params, rtol=1e-4, atol=1e-6)


def test_a_stopped_training_continues_to_the_same_nets(trained, tmp_path, monkeypatch):
    _, net = trained

    class Stop(Exception):
        pass

    def stop(record):
        if record["unit"] == 3:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_recorders", lambda *_: [stop])
        with pytest.raises(Stop):
            train(tmp_path)
    assert not nets.exists(tmp_path)
    resumed = train(tmp_path)
    tiny.assert_equal(resumed.params, net.params)
    assert [record["unit"] for record in resumed.history] == [1, 2, 3, 4]


def test_members_have_examples_and_constants_of_their_own(tmp_path):
    """A loss that is a constant times the first logit: its sign says which way the members go."""

    def loss(logits, batch, hyper, constants):
        return constants["sign"] * logits[:, 0] + jnp.sum(constants["shared"])

    shared = np.ones(2, np.float32)
    net = train(
        tmp_path,
        examples=[tiny.examples(N, seed) for seed in (0, 1)],
        loss=loss,
        constants=[{"sign": np.float32(sign), "shared": shared} for sign in (1, -1)],
    )
    first = net.logits(tiny.examples(20, seed=7)["inputs"])[..., 0].mean(axis=-1)
    start = MODEL.init(KEYS[0], jnp.zeros((1, 4, 4), jnp.uint8))
    assert first[0] < first[1] and jax.tree.structure(start) == jax.tree.structure(net.params)


def test_nets_of_the_best_checkpoint_by_validation(tmp_path):
    held_out = tiny.examples(12, seed=5)
    net = train(tmp_path, selection="validation", evaluation={"validation_errors": held_out})
    history = nets.read_meta(tmp_path)["history"]
    wrong = net.logits(held_out["inputs"]).argmax(axis=-1) != held_out["label"]
    assert history[-1]["validation_errors"] == wrong.sum(axis=-1).tolist()
    with pytest.raises(UserError, match="no validation set is held out"):
        train(tmp_path / "none", selection="validation")


def test_parameters_to_start_from(trained, tmp_path):
    _, net = trained
    still = dataclasses.replace(RECIPE, optimizer=lambda *_: optimizers.adam(lambda step: 0.0))
    moved = train(tmp_path, start=net.params, recipe=still)
    tiny.assert_equal(moved.params, net.params)


def test_sizes_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="epochs 4 is not a multiple of report_every 3"):
        train(tmp_path, recipe=trainer.Recipe(epochs=4, batch_size=8, report_every=3))
    with pytest.raises(UserError, match="batch_size 31 is more than the 30 examples"):
        train(tmp_path, recipe=trainer.Recipe(epochs=4, batch_size=31))
    with pytest.raises(UserError, match="3 sets of examples for 2 keys"):
        train(tmp_path, examples=[tiny.examples(N)] * 3)
