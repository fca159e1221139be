"""Models with a state, which training changes besides the parameters: here a running mean of inputs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh

from distill_jax import (
    checkpoints,
    models,
    nets,
    optimizers,
    sharding,
    soft_targets,
    step_losses,
    train_step,
    trainer,
)
from distill_jax.errors import UserError
from distill_jax.specialists import heads

OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))
HYPER = {"learning_rate": 0.1, "temperature": 3.0, "hard_weight": 0.3}


def flat(inputs):
    return inputs.reshape(len(inputs), -1).astype(jnp.float32) / 255


def init(key, inputs):
    kernel = jax.random.normal(key, (flat(inputs).shape[1], tiny.CLASSES)) / 4
    state = {"mean": jnp.zeros(len(kernel)), "steps": jnp.int32(0)}
    return models.Variables({"output": {"kernel": kernel}}, state)


def hidden(variables, inputs, dropout_key=None):
    return flat(inputs) - variables.state["mean"][None]


def train(variables, inputs, dropout_key, output="apply"):
    before, mean = variables.state, jnp.mean(flat(inputs), axis=0)
    outputs = flat(inputs) - mean[None]
    if output == "apply":
        outputs = outputs @ variables.params["output"]["kernel"]
    mean = jax.lax.stop_gradient(0.9 * before["mean"] + 0.1 * mean)
    return outputs, {"mean": mean, "steps": before["steps"] + 1}


def apply(variables, inputs, dropout_key=None):
    return hidden(variables, inputs) @ variables.params["output"]["kernel"]


CENTRED = models.Model(init, apply, hidden, train=train)
PLAIN = models.mlp([], tiny.CLASSES)


def batch_of(count=16):
    fields = {**tiny.examples(count), "teacher_logits": tiny.teacher_logits(count)}
    return {name: jnp.asarray(field) for name, field in fields.items()}


def fresh(model=CENTRED):
    return train_step.init_state(model, OPTIMIZER, jax.random.key(3), batch_of()["inputs"])


def step_of(loss=step_losses.distillation_loss, model=CENTRED, **options):
    return train_step.make_train_step(model, OPTIMIZER, loss, **options)


def test_a_step_takes_the_batchs_statistics_and_keeps_the_running_ones(key):
    """The input's mean is that of its batch: the same step as of inputs less their mean."""
    state, batch = fresh(), batch_of()
    x = np.float64(batch["inputs"]).reshape(16, -1) / 255
    centred = {**batch, "inputs": jnp.asarray(x - x.mean(0), jnp.float32)}
    kernel = {"output": {**state.params["output"], "bias": jnp.zeros(tiny.CLASSES)}}
    expected = train_step.state_of(kernel, OPTIMIZER)
    expected, sums = step_of(model=PLAIN)(expected, centred, key, tiny.hyper())
    state, metrics = jax.jit(step_of())(state, batch, key, tiny.hyper())
    tiny.assert_close(metrics, sums)
    tiny.assert_close(state.params["output"]["kernel"], expected.params["output"]["kernel"])
    tiny.assert_close(state.model_state, {"mean": 0.1 * x.mean(0), "steps": 1})


def test_the_loss_in_evaluation_is_of_the_running_statistics(key):
    state, batch = fresh(), batch_of()
    measure = train_step.make_loss_step(CENTRED, step_losses.label_loss)
    after, metrics = measure(state, batch, key, tiny.hyper())
    tiny.assert_equal(after, state)
    logits = CENTRED.apply(state.variables, batch["inputs"])
    values = step_losses.label_loss(logits, batch, tiny.hyper())
    np.testing.assert_allclose(metrics["loss"], np.sum(values), rtol=1e-5)


def test_a_fused_loss_has_the_same_step(key):
    dense, fused = (step_of(loss) for loss in (step_losses.distillation_loss, FUSED))
    tiny.assert_close(
        fused(fresh(), batch_of(), key, tiny.hyper()), dense(fresh(), batch_of(), key, tiny.hyper())
    )


FUSED = train_step.Fused(step_losses.distillation_loss)


def test_the_state_goes_through_micro_batches_in_turn(key):
    state, batch = fresh(), batch_of()
    found, _ = step_of(micro_batches=2)(state, batch, key, tiny.hyper())
    first, second = (flat(batch["inputs"])[start::2].mean(0) for start in (0, 1))
    tiny.assert_close(found.model_state, {"mean": 0.09 * first + 0.1 * second, "steps": 2})


def test_under_pmap_states_are_averaged(key):
    step = sharding.compile_pmap_step(step_of(axis_name="data"))
    found, _ = step(fresh(), batch_of(), key, tiny.hyper())
    expected, _ = step_of()(fresh(), batch_of(), key, tiny.hyper())
    tiny.assert_close(found.model_state, expected.model_state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"mean": jnp.zeros(2)}, r"state\['mean'\] from float32 \(16,\) to float32 \(2,\)"),
        ({"seen": jnp.zeros(2)}, r"state\['mean'\] from float32 \(16,\) to nothing"),
    ],
)
def test_a_state_of_another_form_is_named(state, message, key):
    model = CENTRED._replace(train=lambda *args: (CENTRED.apply(*args[:2]), state))
    with pytest.raises(UserError, match=message):
        step_of(model=model)(fresh(), batch_of(), key, tiny.hyper())


@pytest.mark.parametrize("place", ["trunk", "head"])
def test_a_chain_keeps_the_state_of_its_parts(place, key):
    trunk = models.Model(
        lambda key, inputs: models.split(init(key, inputs))._replace(params={}),
        hidden,
        train=lambda *args: train(*args, output="hidden"),
    )
    parts = (trunk, PLAIN) if place == "trunk" else (models.Model(no_params, unchanged), CENTRED)
    chained = models.chain(*parts)
    state, batch = fresh(chained), batch_of()
    expected = fresh()._replace(params={"output": {"kernel": state.params["output"]["kernel"]}})
    assert state.model_state["head" if place == "trunk" else "trunk"] == ()
    state, metrics = step_of(model=chained)(state, batch, key, tiny.hyper())
    expected, sums = step_of()(expected, batch, key, tiny.hyper())
    tiny.assert_close(metrics, sums)
    tiny.assert_close(state.model_state[place], expected.model_state)
    logits, of_one = (
        model.apply(state.variables, batch["inputs"])
        for model, state in ((chained, state), (CENTRED, expected))
    )
    if place == "head":
        tiny.assert_close(logits, of_one)


def no_params(key, inputs):
    return {}


def unchanged(params, inputs, dropout_key=None):
    return inputs


def run(folder, examples, count=2, first=0, **options):
    recipe = trainer.Recipe(
        epochs=options.pop("epochs", 2), batch_size=8, optimizer=lambda steps, epochs: OPTIMIZER
    )
    keys = jax.random.split(jax.random.key(0), 2)[first : first + count]
    more = {"keys": keys, "hyper": HYPER, **options}
    return trainer.train(folder, CENTRED, examples, step_losses.label_loss, recipe, **more)


def test_what_reads_params_takes_variables():
    variables = CENTRED.init(jax.random.key(0), batch_of()["inputs"])
    assert models.parameter_count(variables) == 16 * tiny.CLASSES
    layer = {**variables.params["output"], "bias": jnp.zeros(tiny.CLASSES)}
    whole = variables._replace(params={"output": layer})
    unit = heads.reduce_output(whole, jnp.array([1]), tiny.CLASSES)
    assert unit.params["output"]["kernel"].shape == (16, 2) and unit.state is whole.state
    chained = models.Variables({"conv_0": {}, **whole.params}, {"trunk": (), "head": whole.state})
    tiny.assert_equal(models.head_params(chained), whole)


def test_training_with_a_state(tmp_path):
    """Members as alone, one device as eight, resumed as at once; evaluated, saved, loaded, a teacher."""
    examples, held_out = tiny.examples(32), tiny.examples(12, seed=5)
    net = run(tmp_path / "net", examples, evaluation={"test_errors": held_out})
    assert net.params.state["steps"].tolist() == [8, 8]
    one_device = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    alone = run(tmp_path / "one", examples, 1, 1, mesh=one_device)
    tiny.assert_close(alone.member(0).params, net.member(1).params)
    run(tmp_path / "resumed", examples, epochs=1)
    resumed = run(tmp_path / "resumed", examples)
    tiny.assert_equal(resumed.params, net.params)

    read = nets.load_net(tmp_path / "net", 1, CENTRED)
    tiny.assert_equal(read.params, net.member(1).params)
    other = read.params._replace(state={**read.params.state, "steps": np.int32(9)})
    assert read.fingerprint != read._replace(params=other).fingerprint
    logits = read.logits(held_out["inputs"])
    errors = int((logits.argmax(-1) != held_out["label"]).sum())
    assert read.history[-1]["test_errors"] == errors
    with pytest.raises(UserError, match=r"does not fit the model: .* state/mean is"):
        nets.load_net(tmp_path / "net", model=PLAIN)

    online = train_step.online_teacher(CENTRED.apply)
    made = online({"inputs": held_out["inputs"]}, None, {"teacher": read.params})
    cached = soft_targets.logits_over(CENTRED.apply, read.params, held_out["inputs"])
    tiny.assert_close(made["teacher_logits"], cached)
    again = run(tmp_path / "again", examples, start=net.params)
    assert again.params.state["steps"].tolist() == [16, 16]


class Before(NamedTuple):
    """A training state of a version that knew of no model state."""

    step: Any
    params: Any
    opt_state: Any


def test_checkpoints_hold_the_state_and_those_of_before_are_read(tmp_path):
    stateful, plain = fresh(), fresh(PLAIN)
    for name, stored, state in (("now", stateful, stateful), ("before", Before(*plain[:3]), plain)):
        with checkpoints.open_dir(tmp_path / name) as manager:
            checkpoints.save(manager, 1, stored, [])
            checkpoints.wait(manager)
            tiny.assert_equal(checkpoints.restore_newest(manager, state).state, state)
