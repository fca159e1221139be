"""The trainer: members as one program, resumed, saved when finished, and then read."""

import contextlib
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from distill_jax import models, nets, optimizers, step_losses, trainer, training_note
from distill_jax.data import augment
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
        options.pop("loss", step_losses.label_loss),
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


def constant(steps, epochs):
    return optimizers.sgd(lambda step: 1.0)


@pytest.mark.parametrize("units", [2, 1], ids=["finished", "stopped"])
def test_more_epochs_go_on_from_the_last_checkpoint(units, tmp_path, monkeypatch, capsys):
    long = dataclasses.replace(RECIPE, optimizer=constant)
    short = dataclasses.replace(long, epochs=2)
    stop_after(units, monkeypatch, lambda: train(tmp_path / "extended", short))
    before = nets.exists(tmp_path / "extended") and nets.load(tmp_path / "extended")
    capsys.readouterr()
    extended = train(tmp_path / "extended", long, config={"hidden": (8,), "epochs": 4})
    assert (
        "net: continues to 4 epochs; what is done had the schedule of 2" in capsys.readouterr().out
    )
    once = train(tmp_path / "once", long)
    tiny.assert_equal(extended.params, once.params)
    assert [record["unit"] for record in extended.history] == [1, 2, 3, 4]
    assert bool(before) == (units == 2) and nets.load(tmp_path / "extended").about["epochs"] == 4
    with pytest.raises(UserError, match="was begun with 4 epochs: there can be more, not 2"):
        train(tmp_path / "extended", short)


def stop_after(units, monkeypatch, run):
    """Runs a training that is lost after so many units, if it has more."""

    def stop(record):
        if record["unit"] > units:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(trainer, "_recorders", lambda *_: [stop])
        run()


def test_nets_without_checkpoints_can_not_go_on(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    with pytest.raises(
        UserError, match="has nets of 4 epochs, but no checkpoints to continue from to 8"
    ):
        train_again(tmp_path / "copy", recipe=dataclasses.replace(RECIPE, epochs=8))


def train_again(folder, **changes):
    """The call of the fixture `trained`, with changes."""
    evaluation = {"test_errors": tiny.examples(12, seed=5)}
    return train(folder, **{"evaluation": evaluation, **changes})


def other_examples(field, value):
    examples = tiny.examples(N)
    return {**examples, field: value(examples[field])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recipe": trainer.Recipe(epochs=4, batch_size=10)},
            "recipe.batch_size is 8 there and 10",
        ),
        (
            {"recipe": dataclasses.replace(RECIPE, optimizer=constant)},
            r"recipe.optimizer is 'distill_jax\.recipe\.adam' there and '.*constant' now",
        ),
        (
            {"recipe": dataclasses.replace(RECIPE, transforms=[augment.jitter(2)])},
            r"recipe.transforms is \[\] there and None now, recipe.transforms.0.* is None there",
        ),
        (
            {"hyper": {"learning_rate": 0.01}},
            "hyper.learning_rate is .*, 0.0199.* there and .* now",
        ),
        ({"keys": jax.random.split(jax.random.key(4), 2)}, r"keys is \[\["),
        (
            {"loss": step_losses.distillation_loss},
            "loss is .*label_loss' there and .*distillation_los",
        ),
        ({"examples": other_examples("label", lambda x: x[::-1])}, "examples.label is 'int32"),
        (
            {"examples": other_examples("inputs", lambda x: x + np.uint8(1))},
            "examples.inputs is 'uint8",
        ),
        (
            {"start": {"w": np.zeros(2)}},
            "start.w is None there and",
        ),
        ({"selection": "validation"}, "selection is 'last' there and 'validation' now"),
        ({"evaluation": {}}, "evaluation.test_errors.inputs is .* there and None now"),
        ({"config": {"hidden": (8,), "epochs": 4}}, "config.epochs is None there and 4 now"),
    ],
)
def test_a_changed_part_of_a_training_is_named(changes, message, trained):
    with pytest.raises(UserError, match=message):
        train_again(trained[0], **changes)


def test_where_nothing_is_done_yet_a_training_may_be_another(tmp_path):
    with pytest.raises(UserError, match="is nan at step 0"):
        train(tmp_path, loss=lambda logits, *_: logits[:, 0] * jnp.nan)
    net = train(tmp_path, recipe=trainer.Recipe(epochs=1, batch_size=16))
    assert net.history[-1]["step"] == [1, 1]


def test_rounding_errors_of_another_device_are_no_other_training(caplog, tmp_path):
    def note(scale):
        features = scale * np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
        return training_note.describe({"features": features})

    training_note.write(tmp_path, note(1.0), 4)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    training_note.check(tmp_path, note(1.0), 4, "net")
    assert not caplog.text
    training_note.check(tmp_path, note(1.0001), 4, "net")
    assert "features of" in caplog.text and "has other rounding errors than before" in caplog.text
    with pytest.raises(UserError, match="features is 'float32"):
        training_note.check(tmp_path, note(1.2), 4, "net")


def test_a_net_of_an_earlier_version_is_read_with_a_word(trained, tmp_path, caplog):
    shutil.copytree(trained[0], tmp_path / "copy")
    (tmp_path / "copy" / "training.json").unlink()
    tiny.assert_equal(train(tmp_path / "copy").params, trained[1].params)
    assert "is of an earlier version: what it was trained with isn't known" in caplog.text
    with pytest.raises(UserError, match="hidden is"):
        train(tmp_path / "copy", config={"hidden": (9,)})


@pytest.mark.parametrize("wrapper", ["apply_if_finite", "add_noise"])
def test_optimizers_whose_state_has_booleans_or_random_keys(wrapper, tmp_path, monkeypatch):
    def optimizer(steps, epochs):
        inner = optimizers.sgd(lambda step: 1.0)
        if wrapper == "apply_if_finite":
            return optax.apply_if_finite(inner, 3)
        return optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(1)), inner)

    recipe = trainer.Recipe(epochs=2, batch_size=16, optimizer=optimizer)
    once = train(tmp_path / "once", recipe)
    stop_after(1, monkeypatch, lambda: train(tmp_path / "stopped", recipe))
    assert not nets.exists(tmp_path / "stopped")
    tiny.assert_equal(train(tmp_path / "stopped", recipe).params, once.params)


def test_sizes_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="epochs 4 is not a multiple of report_every 3"):
        train(tmp_path, recipe=trainer.Recipe(epochs=4, batch_size=8, report_every=3))
    with pytest.raises(UserError, match="batch_size 31 is more than the 30 examples"):
        train(tmp_path, recipe=trainer.Recipe(epochs=4, batch_size=31))
    with pytest.raises(UserError, match="3 sets of examples for 2 keys"):
        train(tmp_path, examples=[tiny.examples(N)] * 3)
