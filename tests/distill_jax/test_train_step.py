"""The train step: its arithmetic, randomness, metrics and the teacher's two ways in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from distill_jax import losses, models, optimizers, step_losses, train_step
from distill_jax.data.augment import jitter
from distill_jax.errors import UserError
from distill_jax.soft_targets import TOP_K_FIELDS, densify, top_k

OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))
DROPOUT = models.mlp([8], tiny.CLASSES, input_dropout=0.2, hidden_dropout=0.5)
PLAIN = models.mlp([8], tiny.CLASSES)
LOSSES = [
    step_losses.label_loss,
    step_losses.distillation_loss,
    step_losses.label_modified_loss,
    step_losses.logit_matching_loss,
]


def make_batch(count=8, teacher=True):
    fields = tiny.examples(count)
    if teacher:
        fields["teacher_logits"] = tiny.teacher_logits(count)
    return {name: jnp.asarray(field) for name, field in fields.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def fresh(model=PLAIN, seed=0):
    images = jnp.zeros((1, 4, 4), jnp.uint8)
    return train_step.init_state(model, OPTIMIZER, jax.random.key(seed), images)


def make_step(model=PLAIN, loss=step_losses.distillation_loss, **kwargs):
    return jax.jit(train_step.make_train_step(model, OPTIMIZER, loss, **kwargs))


def test_two_steps_are_those_of_float64(key):
    model = models.mlp([], tiny.CLASSES)  # softmax regression, whose gradient is known
    state, batch = fresh(model), make_batch()
    step = make_step(model, step_losses.label_loss)
    kernel = np.float64(state.params["output"]["kernel"])
    x, onehot = np.float64(batch["inputs"]).reshape(8, -1) / 255, np.eye(3)[batch["label"]]
    bias, traces = np.zeros(3), [0.0, 0.0]
    for _ in range(2):
        state, metrics = step(state, batch, key, tiny.hyper(learning_rate=0.2))
        z = x @ kernel + bias
        log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
        np.testing.assert_allclose(metrics["loss"], -(onehot * log_q).sum(), rtol=1e-5)
        difference = (np.exp(log_q) - onehot) / 8
        grads = [x.T @ difference, difference.sum(0)]
        traces = [0.9 * v + g for v, g in zip(traces, grads, strict=True)]
        kernel -= 0.2 * (grads[0] + 0.9 * traces[0])
        bias -= 0.2 * (grads[1] + 0.9 * traces[1])
    assert state.step == 2 and state.step.dtype == jnp.int32
    tiny.assert_close(state.params["output"], {"kernel": kernel, "bias": bias})


@pytest.mark.parametrize("loss", LOSSES)
def test_step_descends_the_mean_of_its_loss(loss, key):
    state, batch, hyper = fresh(), make_batch(), tiny.hyper()

    def mean(params):
        return jnp.mean(loss(PLAIN.apply(params, batch["inputs"]), batch, hyper))

    found, metrics = make_step(loss=loss)(state, batch, key, hyper)
    value, grads = jax.value_and_grad(mean)(state.params)
    # The first step of Nesterov's momentum 0.9.
    expected = jax.tree.map(lambda p, g: p - 0.1 * 1.9 * g, state.params, grads)
    tiny.assert_close(found.params, expected)
    np.testing.assert_allclose(metrics["loss"], 8 * value, rtol=1e-5)


def test_losses_are_those_of_the_library():
    batch, hyper = make_batch(), tiny.hyper(temperature=4.0, hard_weight=0.25)
    z, v, labels = jnp.asarray(tiny.teacher_logits(8, 5)), batch["teacher_logits"], batch["label"]
    p = losses.softmax(v, 4.0)
    known = {**batch, "label_known": jnp.arange(8) < 3}
    expected = {
        step_losses.label_loss: losses.hard_cross_entropy(z, labels),
        step_losses.distillation_loss: losses.distillation(z, p, labels, 4.0, 0.25),
        step_losses.label_modified_loss: losses.soft_cross_entropy(
            z, losses.label_modified(p, labels, 0.25), 4.0
        ),
        step_losses.logit_matching_loss: losses.logit_matching(z, v, zero_mean=True),
    }
    for loss, values in expected.items():
        np.testing.assert_allclose(loss(z, batch, hyper), values, rtol=1e-6)
    for loss in (step_losses.distillation_loss, step_losses.label_modified_loss):
        soft = loss(z, batch, {**hyper, "hard_weight": jnp.float32(0.0)})
        if loss is step_losses.distillation_loss:
            soft = 0.75 * soft
        values = jnp.where(known["label_known"], expected[loss], soft)
        np.testing.assert_allclose(loss(z, known, hyper), values, rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_equal_the_batch(parts, key):
    whole, cut = (make_step(micro_batches=count) for count in (1, parts))
    state, expected = fresh(), fresh()
    for _ in range(3):
        state, metrics = cut(state, make_batch(), key, tiny.hyper())
        expected, sums = whole(expected, make_batch(), key, tiny.hyper())
        tiny.assert_close(metrics, sums)
    tiny.assert_close(state, expected)


def test_micro_batches_draw_their_own_masks(key):
    batch = jax.tree.map(lambda x: jnp.concatenate([x[:4], x[:4]]), make_batch())
    step = make_step(DROPOUT, lambda z, batch, hyper, constants: jnp.sum(z, -1), micro_batches=2)
    _, metrics = step(fresh(DROPOUT), batch, key, tiny.hyper())
    half = make_step(DROPOUT, lambda z, batch, hyper, constants: jnp.sum(z, -1))
    parts = jax.tree.map(lambda x: x[:4], batch)
    _, alone = half(fresh(DROPOUT), parts, key, tiny.hyper())
    assert not np.allclose(metrics["loss"], 2 * alone["loss"])


def test_batch_that_does_not_cut(key):
    with pytest.raises(UserError, match="a batch of 8 can't be cut into 3 equal micro-batches"):
        make_step(micro_batches=3)(fresh(), make_batch(), key, tiny.hyper())


@pytest.mark.parametrize("field", [jnp.float32(0.5), jnp.ones(tiny.CLASSES)])
def test_micro_batches_are_cut_from_fields_of_examples(field, key):
    with pytest.raises(UserError, match=r"a batch of 8 examples, but 'prior' is \[.*constants"):
        make_step(micro_batches=2)(fresh(), {**make_batch(), "prior": field}, key, tiny.hyper())


def test_a_fused_loss_finds_the_output_layer_by_its_name(key):
    def inner(params):
        return {"hidden_0": params["net"]["hidden_0"], "output": params["net"]["head"]}

    def init(key, inputs):
        params = PLAIN.init(key, inputs)
        return {"net": {"hidden_0": params["hidden_0"], "head": params["output"]}}

    own = models.Model(
        init,
        lambda params, *args, **how: PLAIN.apply(inner(params), *args, **how),
        lambda params, *args, **how: PLAIN.hidden(inner(params), *args, **how),
    )
    fused = train_step.Fused(step_losses.distillation_loss, output="head")
    found = make_step(own, fused)(fresh(own), make_batch(), key, tiny.hyper())
    tiny.assert_close(found, make_step(own)(fresh(own), make_batch(), key, tiny.hyper()))
    with pytest.raises(UserError, match=r"no layer .* named 'output', only head, hidden_0, net"):
        make_step(own, fused._replace(output="output"))(fresh(own), make_batch(), key, tiny.hyper())


def test_randomness_is_the_keys_and_the_steps(key):
    step = make_step(DROPOUT)

    def params_after(key, at):
        state = fresh(DROPOUT)._replace(step=jnp.int32(at))
        return step(state, make_batch(), key, tiny.hyper())[0].params["hidden_0"]["kernel"]

    first = params_after(key, 0)
    np.testing.assert_array_equal(first, params_after(jax.random.key(0), 0))
    assert not np.allclose(first, params_after(key, 1))
    assert not np.allclose(first, params_after(jax.random.key(1), 0))


def test_donation_changes_nothing(key):
    plain = make_step(DROPOUT)
    donating = jax.jit(
        train_step.make_train_step(DROPOUT, OPTIMIZER, step_losses.distillation_loss),
        donate_argnums=0,
    )
    expected, state = fresh(DROPOUT), fresh(DROPOUT)
    for _ in range(3):
        before = state
        state, _ = donating(state, make_batch(), key, tiny.hyper())
        expected, _ = plain(expected, make_batch(), key, tiny.hyper())
        assert before.params["hidden_0"]["kernel"].is_deleted()
    tiny.assert_equal(state, expected)


def test_metrics_are_sums_and_unknown_labels_are_no_errors(key):
    batch = make_batch()
    batch["label"] = batch["label"].at[:3].set(-1)
    batch["label_known"] = batch["label"] >= 0
    state = fresh()
    _, metrics = make_step()(state, batch, key, tiny.hyper())
    z = PLAIN.apply(state.params, batch["inputs"])
    wrong = np.argmax(z, -1)[3:] != np.asarray(batch["label"])[3:]
    assert 0 < wrong.sum() < 5
    assert (metrics["errors"], metrics["count"]) == (wrong.sum(), 5)
    assert {name: value.dtype for name, value in metrics.items()} == {
        "loss": jnp.float32,
        "examples": jnp.int32,
        "errors": jnp.int32,
        "count": jnp.int32,
    }
    values = step_losses.distillation_loss(z, batch, tiny.hyper())
    np.testing.assert_allclose(metrics["loss"], np.sum(values), rtol=1e-5)
    evaluated = train_step.make_eval_step(PLAIN)(state.params, batch)
    assert evaluated == {"errors": wrong.sum(), "count": 5}


def test_evaluation_drops_nothing():
    params, batch = fresh(DROPOUT).params, make_batch()
    found = train_step.make_eval_step(DROPOUT)(params, batch)
    tiny.assert_equal(found, train_step.make_eval_step(PLAIN)(params, batch))


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_missing_teacher_logits(loss, key):
    with pytest.raises(UserError, match=r"no teacher_logits, only \['id', 'inputs', 'label'\]"):
        make_step(loss=loss)(fresh(), make_batch(teacher=False), key, tiny.hyper())


def test_online_teacher_equals_cached_targets(key):
    teacher = fresh(DROPOUT, 7).params
    images = make_batch()["inputs"]
    online = make_step(transforms=[train_step.online_teacher(DROPOUT.apply)])
    constants = {"teacher": teacher}
    found, metrics = online(fresh(), make_batch(teacher=False), key, tiny.hyper(), constants)
    cached = {**make_batch(), "teacher_logits": DROPOUT.apply(teacher, images)}
    expected, sums = make_step()(fresh(), cached, key, tiny.hyper())
    tiny.assert_close((found, metrics), (expected, sums))


def test_online_teacher_gets_no_gradient(key):
    batch, state, hyper = make_batch(teacher=False), fresh(), tiny.hyper()

    def trained(teacher):
        transform = train_step.online_teacher(PLAIN.apply)
        # The square of the logits' difference, which unlike the library's losses stops nothing.
        step = train_step.make_train_step(
            PLAIN,
            OPTIMIZER,
            lambda z, batch, hyper, constants: jnp.sum(jnp.square(z - batch["teacher_logits"]), -1),
            transforms=[transform],
        )
        state_after, metrics = step(state, batch, key, hyper, {"teacher": teacher})
        return metrics["loss"] + sum(jnp.sum(x) for x in jax.tree.leaves(state_after.params))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(trained))(fresh(PLAIN, 7).params)):
        assert not leaf.any()


def test_jitter_refuses_cached_targets(key):
    with pytest.raises(UserError, match="online_teacher after the jitter"):
        make_step(transforms=[jitter(1)])(fresh(), make_batch(), key, tiny.hyper())


def test_online_teacher_sees_the_jittered_images(key):
    batch = make_batch(teacher=False)

    def flat(images):
        return images.reshape(8, -1).astype(jnp.float32)

    def changed(
        z, moved, hyper, constants
    ):  # number of examples whose image moved, if the teacher saw it so
        agree = jnp.all(moved["teacher_logits"] == flat(moved["inputs"]), -1)
        differ = jnp.any(flat(moved["inputs"]) != flat(batch["inputs"]), -1)
        return jnp.where(agree, differ.astype(jnp.float32), jnp.nan) + 0 * jnp.sum(z, -1)

    teacher = train_step.online_teacher(lambda _, images: flat(images))
    step = make_step(loss=changed, transforms=[jitter(2), teacher])
    _, metrics = step(fresh(), batch, key, tiny.hyper(), {"teacher": {}})
    assert metrics["loss"] >= 5  # of 8; one of 25 shifts is none


def test_jitter_and_online_teacher_train(key):
    constants = {"teacher": fresh(PLAIN, 7).params}
    step = make_step(transforms=[jitter(1), train_step.online_teacher(PLAIN.apply)])
    state, first = step(fresh(), make_batch(teacher=False), key, tiny.hyper(), constants)
    for _ in range(30):
        state, last = step(state, make_batch(teacher=False), key, tiny.hyper(), constants)
    assert last["loss"] < first["loss"]


def test_one_trace_serves_all_hyper_values(key):
    traces = []

    def loss(logits, batch, hyper, constants):
        traces.append(1)
        return step_losses.distillation_loss(logits, batch, hyper)

    step = make_step(loss=loss)
    state, batch = fresh(), make_batch()
    state, first = step(state, batch, key, tiny.hyper())
    values = tiny.hyper(temperature=9.0, hard_weight=0.0, learning_rate=0.01)
    _, second = step(state, batch, key, values)
    assert len(traces) == 1
    assert first["loss"] != second["loss"]


def top_k_batch(k=2):
    batch = make_batch()
    fields = top_k(losses.softmax(batch.pop("teacher_logits"), 3.0), k)
    return {**batch, **dict(zip(TOP_K_FIELDS, fields, strict=True))}


@pytest.mark.parametrize("tail_weights", [None, np.array([0.5, 0.3, 0.2])])
@pytest.mark.parametrize("parts", [1, 4])
def test_top_k_loss_trains_as_its_dense_targets_do(tail_weights, parts, key):
    batch = {**top_k_batch(1), "label_known": jnp.arange(8) % 2 == 0}
    fields = [batch[name] for name in TOP_K_FIELDS]
    weights = None if tail_weights is None else jnp.asarray(tail_weights, jnp.float32)
    dense = densify(*fields, weights, tiny.CLASSES)

    def dense_loss(logits, batch, hyper, constants):
        known = batch["label_known"]
        return losses.distillation(logits, dense, batch["label"], 3.0, 0.3, label_known=known)

    loss = step_losses.top_k_distillation_loss(tail_weights)
    found, metrics = make_step(loss=loss, micro_batches=parts)(fresh(), batch, key, tiny.hyper())
    expected, sums = make_step(loss=dense_loss)(fresh(), batch, key, tiny.hyper())
    tiny.assert_close((found, metrics), (expected, sums))


def test_one_trace_of_the_top_k_loss_serves_members_of_other_temperatures():
    batch, z, traces = top_k_batch(), jnp.asarray(tiny.teacher_logits(8, 5)), []

    def loss(hyper):
        traces.append(1)
        return step_losses.top_k_distillation_loss()(z, batch, hyper)

    hypers = [tiny.hyper(temperature=t, hard_weight=w) for t, w in ((1, 0), (3, 0.5), (20, 1))]
    found = jax.jit(jax.vmap(loss))(jax.tree.map(lambda *x: jnp.stack(x), *hypers))
    assert len(traces) == 1
    for values, hyper in zip(found, hypers, strict=True):
        np.testing.assert_allclose(values, loss(hyper), rtol=1e-5)
    np.testing.assert_allclose(found[2], losses.hard_cross_entropy(z, batch["label"]), rtol=1e-5)


def test_missing_top_k_targets(key):
    batch = top_k_batch()
    del batch["teacher_tail"]
    with pytest.raises(UserError, match=r"no teacher_tail, only .*soft_targets\.attach"):
        make_step(loss=step_losses.top_k_distillation_loss())(fresh(), batch, key, tiny.hyper())
