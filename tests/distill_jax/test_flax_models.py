"""Flax modules of one's own as models: Linen and NNX, with state, dropout, inputs of several arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh

from distill_jax import (
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

OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0), max_norm=2.0)
HYPER = {"learning_rate": 0.1, "temperature": 3.0, "hard_weight": 0.3}
UNITS = 5


class Linen(nn.Module):
    """BatchNorm, dropout, another stream of random numbers, and a counter."""

    rate: float = 0.5

    @nn.compact
    def features(self, x, train):
        x = nn.Dense(UNITS, name="hidden_0")(x.reshape(len(x), -1).astype(jnp.float32) / 255)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8, name="norm")(x)
        calls = self.variable("counts", "calls", lambda: jnp.int32(0))
        if train:
            calls.value += 1
            x = x + 0.01 * self.rate * jax.random.normal(self.make_rng("noise"), x.shape)
        self.sow("intermediates", "normed", x)
        return nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(tiny.CLASSES, name="output")(self.features(x, train))


class Nnx(nnx.Module):
    """The same without the other stream."""

    def __init__(self, rngs, rate=0.5):
        self.layers = nnx.List([nnx.Linear(16, UNITS, rngs=rngs)])
        self.norm = nnx.BatchNorm(UNITS, momentum=0.8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.output = nnx.Linear(UNITS, tiny.CLASSES, rngs=rngs)
        self.calls = nnx.Variable(jnp.int32(0))

    def features(self, x):
        x = self.norm(self.layers[0](x.reshape(len(x), -1).astype(jnp.float32) / 255))
        if not self.dropout.deterministic:
            self.calls.set_value(self.calls.get_value() + 1)
        self.sow(nnx.Intermediate, "normed", x)
        return self.dropout(nnx.relu(x))

    def __call__(self, x):
        return self.output(self.features(x))


def plain_nnx(rngs):
    return Nnx(rngs, rate=0.0)


NAMES = ("normed", "output")
STOCHASTIC = {
    "linen": models.from_linen(Linen(), hidden="features", activations=NAMES),
    "nnx": models.from_nnx(Nnx, hidden="features", activations=NAMES),
}
MODELS = {
    "linen": models.from_linen(Linen(0.0), hidden="features", activations=NAMES),
    "nnx": models.from_nnx(plain_nnx, hidden="features", activations=NAMES),
}
BOTH = pytest.mark.parametrize("kind", ["linen", "nnx"])


def inputs_of(count=8):
    return jnp.asarray(tiny.examples(count)["inputs"])


def parts_of(variables):
    """Hidden layer, norm, its statistics, output layer and counter of either kind."""
    params, state = variables
    if "batch_stats" in state:
        norm, calls = state["batch_stats"]["norm"], state["counts"]["calls"]
        return params["hidden_0"], params["norm"], norm, params["output"], calls
    return params["layers"]["0"], params["norm"], state["norm"], params["output"], state["calls"]


@BOTH
def test_modes_are_those_of_float64(kind, key):
    """The batch's statistics in training, the running ones in evaluation; no other state changes."""
    model, inputs = MODELS[kind], inputs_of()
    variables = jax.jit(model.init)(key, inputs)
    dense, norm, _, output, calls = jax.tree.map(np.float64, parts_of(variables))
    x = np.float64(inputs).reshape(8, -1) / 255 @ dense["kernel"]
    mean, var = x.mean(0), x.var(0)

    def logits(x, mean, var):
        normed = (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
        return np.maximum(normed, 0) @ output["kernel"] + output["bias"]

    found, state = jax.jit(model.train)(variables, inputs, key)
    np.testing.assert_allclose(found, logits(x, mean, var), rtol=1e-4, atol=1e-5)
    _, _, after, _, count = parts_of(variables._replace(state=state))
    tiny.assert_close(after, {"mean": 0.2 * mean, "var": 0.8 + 0.2 * var})
    assert (calls, count) == (0, 1)
    variables = variables._replace(state=state)
    found = jax.jit(model.apply)(variables, inputs)
    expected = logits(x, np.float64(after["mean"]), np.float64(after["var"]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with_key = model.apply(variables, inputs, dropout_key=key)
    np.testing.assert_allclose(with_key, found, rtol=1e-5, atol=1e-6)


@BOTH
def test_random_numbers_are_the_keys(kind, key):
    model, inputs = STOCHASTIC[kind], inputs_of()
    variables = model.init(key, inputs)
    train = jax.jit(model.train)
    first, again = (train(variables, inputs, key)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, train(variables, inputs, jax.random.key(1))[0])


def test_equal_arguments_give_the_same_model():
    same = models.from_linen(Linen(), hidden="features", activations=list(NAMES))
    assert same is STOCHASTIC["linen"] and models.from_linen(Linen()) is not same
    assert models.from_nnx(Nnx) is models.from_nnx(Nnx)
    shapes = jax.eval_shape(models.from_linen(Lists([4])).init, jax.random.key(0), inputs_of())
    assert shapes["Dense_0"]["kernel"].shape == (16, 4)


class Lists(nn.Module):
    """Without state; in evaluation mode by a field, which has no usual name."""

    sizes: list[int]
    mode: str = "train"
    rate: float = 0.5

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.sizes[0])(x.reshape(len(x), -1).astype(jnp.float32))
        return nn.Dropout(self.rate)(x, deterministic=self.mode == "test")


def test_modes_by_the_users_own_names(key):
    model = models.from_linen(Lists((3,)), evaluation={"mode": "test"})
    params, inputs = model.init(key, inputs_of()), inputs_of()
    assert not isinstance(params, models.Variables)  # there is no state
    plain = model.apply(params, inputs)
    np.testing.assert_array_equal(plain, model.apply(params, inputs))
    dropped, state = model.train(params, inputs, key)
    assert state == () and not np.allclose(dropped, plain)
    np.testing.assert_array_equal(dropped, model.apply(params, inputs, dropout_key=key))
    with pytest.raises(
        UserError, match=r"Lists draws random numbers .* in evaluation mode: say what"
    ):
        models.from_linen(Lists((3,))).apply(params, inputs)
    with pytest.raises(
        UserError, match="Lists has no field, and __call__ no argument, named 'modus'"
    ):
        models.from_linen(Lists((3,)), evaluation={"modus": 1}).apply(params, inputs)


@pytest.mark.parametrize("flag", ["train", "deterministic", "use_running_average"])
def test_flags_by_their_usual_names(flag, key):
    class Flagged(nn.Module):
        deterministic: bool = False

    def call(self, x):
        training = self.deterministic is False if flag == "deterministic" else None
        return x + (1.0 if training else 0.0)

    def with_flag(self, x, *, train=None, use_running_average=None):
        training = train if flag == "train" else not use_running_average
        return x + (1.0 if training else 0.0)

    Flagged.__call__ = nn.nowrap(call if flag == "deterministic" else with_flag)
    model, x = models.from_linen(Flagged()), jnp.zeros((2, 3))
    assert model.apply({}, x).sum() == 0 and model.train({}, x, key)[0].sum() == 6


def test_a_state_that_changes_in_evaluation_mode(key):
    class Counts(nnx.Module):
        def __init__(self):
            self.calls = nnx.Variable(jnp.int32(0))

        def __call__(self, x, count=True):
            if count:
                self.calls.set_value(self.calls.get_value() + 1)
            return x

    x = jnp.ones((2, 3))
    refused = models.from_nnx(lambda rngs: Counts())
    variables = refused.init(key, x)
    with pytest.raises(
        UserError, match=r"Counts draws random .* or changes its state in evaluation"
    ):
        refused.apply(variables, x)
    model = models.from_nnx(lambda rngs: Counts(), evaluation={"count": False})
    np.testing.assert_array_equal(model.apply(variables, x), x)
    assert model.train(variables, x, key)[1] == {"calls": 1}


class Pair(nn.Module):
    """Of two arrays."""

    @nn.compact
    def __call__(self, first, second):
        return nn.Dense(2)(first) + nn.Dense(2)(second)


def test_inputs_of_several_arrays(key):
    inputs = {"first": jnp.ones((4, 3)), "second": jnp.ones((4, 5))}
    model = models.from_linen(Pair(), spread=True)
    params = model.init(key, inputs)
    expected = model.apply(params, inputs)
    assert expected.shape == (4, 2)
    np.testing.assert_array_equal(model.apply(params, tuple(inputs.values())), expected)
    with pytest.raises(UserError, match=r"inputs of type .* can't be spread; expected a dict"):
        model.apply(params, inputs["first"])

    class Both(nnx.Module):
        def __call__(self, inputs):
            return inputs["first"] + jnp.sum(inputs["second"], axis=-1, keepdims=True)

    own = models.from_nnx(lambda rngs: Both())
    assert own.init(key, inputs) == {} and own.apply({}, inputs).tolist() == [[6.0] * 3] * 4


@BOTH
def test_hidden_and_named_activations(kind, key):
    model, inputs = MODELS[kind], inputs_of()
    variables = model.init(key, inputs)
    logits, named = model.activations(variables, inputs)
    np.testing.assert_allclose(logits, model.apply(variables, inputs), rtol=1e-5, atol=1e-6)
    hidden = model.hidden(variables, inputs)
    np.testing.assert_allclose(nn.relu(named["normed"]), hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(named["output"], logits, rtol=1e-5, atol=1e-6)
    layer = variables.params["output"]
    np.testing.assert_allclose(
        hidden @ layer["kernel"] + layer["bias"][None], logits, rtol=1e-5, atol=1e-5
    )
    make = {"linen": (models.from_linen, Linen()), "nnx": (models.from_nnx, Nnx)}[kind]
    with pytest.raises(UserError, match=r"no activations are named 'nowhere', only .*norm.*output"):
        make[0](make[1], activations=["nowhere"]).activations(variables, inputs)


def test_outputs_that_are_no_logits(key):
    class Twice(nnx.Module):
        def __call__(self, x):
            return x, x

    with pytest.raises(UserError, match=r"the output of .*Twice is of type tuple; expected float"):
        models.from_nnx(lambda rngs: Twice()).apply({}, jnp.ones((2, 3)))


@BOTH
def test_a_hint_is_the_distance_of_activations(kind, key):
    """The student's are in the graph, the teacher's are not; widths that differ are projected."""
    model, inputs = MODELS[kind], inputs_of()
    student, teacher = (model.init(jax.random.key(seed), inputs) for seed in (0, 1))
    _, hint = model.activations(teacher, inputs)
    (_, own), state = model.train(student, inputs, key, output="activations")
    loss = step_losses.hint_loss("normed", "normed")
    step = train_step.make_train_step(
        model, OPTIMIZER, loss, transforms=[train_step.online_teacher(model.activations)]
    )
    before = train_step.state_of(student, OPTIMIZER)
    batch = {name: jnp.asarray(field) for name, field in tiny.examples(8).items()}
    after, metrics = jax.jit(step)(before, batch, key, tiny.hyper(), {"teacher": teacher})
    expected = np.sum(np.square(np.float64(own["normed"]) - hint["normed"])) / 2
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    tiny.assert_close(after.model_state, state)
    assert not np.allclose(parts_of(after.variables)[0]["kernel"], parts_of(student)[0]["kernel"])
    tiny.assert_equal(after.params["output"], student.params["output"])  # has no part in the hint

    fields = {"student_activations": own, "teacher_activations": hint}
    other, matrix = step_losses.hint_loss("output", "normed"), jnp.ones((tiny.CLASSES, UNITS))
    found = other(own["output"], fields, {}, {"hint_projection": matrix})
    projected = np.sum(own["output"], axis=-1, keepdims=True) - hint["normed"]
    np.testing.assert_allclose(found, np.sum(np.square(projected), -1) / 2, rtol=1e-5)
    with pytest.raises(UserError, match=r"no hint_projection, .*: they are 3 and 5 wide"):
        other(own["output"], fields, {}, {})
    with pytest.raises(UserError, match=r"no student_activations, .*: give the model activations"):
        loss(own["output"], batch, {})


def run(folder, model, examples, first=0, count=2, **options):
    recipe = trainer.Recipe(
        epochs=options.pop("epochs", 2),
        batch_size=8,
        optimizer=lambda steps, epochs: OPTIMIZER,
        fused_logits=options.pop("fused_logits", 0),
    )
    keys = jax.random.split(jax.random.key(0), 2)[first : first + count]
    loss = options.pop("loss", step_losses.label_loss)
    more = {"keys": keys, "hyper": HYPER, **options}
    return trainer.train(folder, model, examples, loss, recipe, **more)


@BOTH
def test_training_and_teaching(kind, tmp_path):
    """Members as alone, one device as eight, resumed as at once, the fused loss as the plain one."""
    model, examples = STOCHASTIC[kind], {**tiny.examples(32), "id": np.arange(32)}
    net = run(tmp_path / "net", model, examples)
    assert parts_of(net.params)[-1].tolist() == [8, 8]
    one_device = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    alone = run(tmp_path / "one", model, examples, 1, 1, mesh=one_device, fused_logits=1)
    tiny.assert_close(alone.member(0).params, net.member(1).params, rtol=1e-4, atol=1e-5)
    run(tmp_path / "resumed", model, examples, epochs=1)
    tiny.assert_equal(run(tmp_path / "resumed", model, examples).params, net.params)

    teacher = nets.load_net(tmp_path / "net", 1, model)
    tiny.assert_equal(teacher.params, net.member(1).params)
    inputs = examples["inputs"]
    digests = soft_targets.digests(inputs)
    soft_targets.write(
        tmp_path / "soft", teacher.logits(inputs), digests, teacher=teacher.fingerprint
    )
    cached = soft_targets.attach(examples, soft_targets.load(tmp_path / "soft"))
    online = train_step.online_teacher(model.apply)
    added = online({"inputs": jnp.asarray(inputs)}, None, {"teacher": teacher.params})
    tiny.assert_close(added["teacher_logits"], cached["teacher_logits"])
    more = {"first": 0, "count": 1, "loss": step_losses.distillation_loss, "epochs": 1}
    student = run(tmp_path / "student", model, cached, **more)
    assert np.isfinite(student.history[-1]["train_loss"]).all()
