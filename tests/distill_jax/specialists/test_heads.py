"""The heads of specialists: how each starts, is trained, and is read."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from distill_jax import losses, models, optimizers, train_step
from distill_jax.errors import UserError
from distill_jax.specialists import heads
from distill_jax.specialists.heads import HEADS, head_of

N, B, C, D = 60, 16, 7, 5
SET = np.array([1, 4, 6], np.int32)
PADDED = np.array([2, 5, C], np.int32)
S = len(SET)
GENERALIST = models.mlp([8], C)
OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))
HYPER = tiny.hyper(learning_rate=0.05, temperature=2.0)
every_head = pytest.mark.parametrize("name", list(HEADS))
both_sets = pytest.mark.parametrize("class_set", [SET, PADDED], ids=["whole", "padded"])


def generalist_params(seed=0):
    """Weights and biases, large enough for its predictions to be far from uniform."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(GENERALIST.init, jax.random.key(0), jnp.zeros((1, D)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32), shapes
    )


def build(name, class_set=SET):
    """The head, its network, what this starts from, a batch for it, and the step's constants."""
    head, random = head_of(name), np.random.default_rng(1)
    constants = {"class_set": jnp.asarray(class_set), "teacher": generalist_params()}
    model = models.mlp([8], head.outputs(S, C))
    start = head.start(constants["teacher"], constants["class_set"], C)
    label = jnp.asarray(np.append(np.arange(C), random.integers(0, C, B - C)), jnp.int32)
    batch = {
        "inputs": jnp.asarray(random.standard_normal((B, D)), jnp.float32),
        "label": head.labels(label, constants["class_set"], C),
    }
    return head, model, start, batch, constants


def make_step(name, model, **options):
    head = head_of(name)
    transforms = head.transforms(GENERALIST)
    return train_step.make_train_step(model, OPTIMIZER, head.loss, transforms=transforms, **options)


def generalist_logits(inputs):
    return GENERALIST.apply(generalist_params(), inputs)


def test_no_other_head():
    with pytest.raises(UserError, match="of unit, logsumexp, full_hard, full_soft, not 'one'"):
        head_of("one")


@every_head
def test_the_start_fits_the_network(name):
    _, model, start, batch, _ = build(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["inputs"])
    tiny.assert_equal(
        jax.tree.map(lambda leaf: leaf.shape, start), jax.tree.map(lambda leaf: leaf.shape, shapes)
    )
    tiny.assert_equal(start["hidden_0"], generalist_params()["hidden_0"])


@both_sets
def test_a_dustbin_of_many_outputs_starts_as_the_generalist(class_set):
    head, model, start, batch, _ = build("logsumexp", class_set)
    logits = generalist_logits(batch["inputs"])
    found = head.read(model.apply(start, batch["inputs"]), jnp.asarray(class_set), jnp.float32(0.0))
    tiny.assert_equal(found, heads.collapse(logits, jnp.asarray(class_set)))
    # The same from the generalist's probabilities, summed by numpy.
    p = np.asarray(jax.nn.softmax(np.asarray(logits, np.float64)))
    real = class_set[class_set < C]
    expected = np.zeros((B, S + 1))
    expected[:, : len(real)] = p[:, real]
    expected[:, S] = np.delete(p, real, axis=1).sum(axis=1)
    np.testing.assert_allclose(jax.nn.softmax(found), expected, rtol=1e-5, atol=1e-7)


@both_sets
def test_one_unit_starts_with_the_generalists_special_logits(class_set):
    head, model, start, batch, _ = build("unit", class_set)
    logits = np.asarray(generalist_logits(batch["inputs"]), np.float64)
    found = head.read(model.apply(start, batch["inputs"]), jnp.asarray(class_set), jnp.float32(0.0))
    real = class_set[class_set < C]
    np.testing.assert_allclose(found[:, : len(real)], logits[:, real], rtol=1e-5, atol=1e-5)
    assert (np.asarray(found[:, len(real) : S]) == -np.inf).all()
    others = np.delete(logits, real, axis=1)
    expected = others.mean(axis=1) + np.log(others.shape[1])
    np.testing.assert_allclose(found[:, S], expected, rtol=1e-5, atol=1e-5)


@both_sets
@pytest.mark.parametrize("name", ["full_hard", "full_soft"])
def test_a_full_softmax_starts_as_the_generalist(name, class_set):
    head, model, start, batch, _ = build(name, class_set)
    found = head.read(model.apply(start, batch["inputs"]), jnp.asarray(class_set), jnp.float32(0.0))
    tiny.assert_equal(found[:, :C], generalist_logits(batch["inputs"]))


@both_sets
@every_head
def test_what_is_read_is_corrected_outside_the_set_alone(name, class_set):
    head, model, start, batch, _ = build(name, class_set)
    logits, class_set = model.apply(start, batch["inputs"]), jnp.asarray(class_set)
    plain, corrected = (head.read(logits, class_set, jnp.float32(c)) for c in (0.0, 0.75))
    outputs = S + 1 if head.has_dustbin else C + 1
    assert corrected.shape == (B, outputs) and corrected.dtype == jnp.float32
    if head.has_dustbin:
        outside = np.arange(outputs) == S
    else:
        outside = ~np.isin(np.arange(outputs), class_set)
        assert (np.asarray(corrected[:, C]) == -np.inf).all()  # there is no dustbin
    expected = np.where(outside, np.asarray(plain) + 0.75, plain)
    np.testing.assert_allclose(corrected, expected, rtol=1e-6, atol=1e-6)


@every_head
def test_many_specialists_are_read_at_once_as_each_alone(name):
    head, model, start, batch, _ = build(name)
    logits = model.apply(start, batch["inputs"])
    sets, corrections = jnp.stack([SET, PADDED]), jnp.array([0.5, -1.0])
    found = jax.vmap(head.read)(jnp.stack([logits, 2 * logits]), sets, corrections)
    assert found.shape[:2] == (2, B)
    for m, scaled in enumerate((logits, 2 * logits)):
        expected = head.read(scaled, sets[m], corrections[m])
        np.testing.assert_allclose(found[m], expected, rtol=1e-6, atol=1e-6)
    three = logits.reshape(4, B // 4, -1)  # more axes in front
    expected = head.read(logits, sets[0], corrections[0]).reshape(4, B // 4, -1)
    np.testing.assert_allclose(head.read(three, sets[0], corrections[0]), expected, rtol=1e-6)


def test_labels_are_the_classes_or_the_outputs_of_one_unit():
    labels = jnp.array([1, 0, 6, -1], jnp.int32)
    for name, head in HEADS.items():
        expected = [0, 3, 2, -1] if name == "unit" else labels
        tiny.assert_equal(head.labels(labels, jnp.asarray(SET), C), np.asarray(expected, np.int32))


def test_soft_targets_are_the_generalists_logits_whatever_the_specialist():
    head, model, start, batch, constants = build("full_soft")
    (add_teacher,) = head.transforms(GENERALIST)
    batch = add_teacher(batch, jax.random.key(0), constants)
    tiny.assert_equal(batch["teacher_logits"], generalist_logits(batch["inputs"]))
    # At its start it agrees with the teacher on other classes: the loss is the teacher's entropy.
    p = losses.softmax(batch["teacher_logits"], HYPER["temperature"])
    entropy = -jnp.sum(p * jnp.log(p), axis=-1) * HYPER["temperature"] ** 2
    found = head.loss(model.apply(start, batch["inputs"]), batch, HYPER, constants)
    other = ~np.isin(batch["label"], SET)
    assert other.any() and not other.all()
    np.testing.assert_allclose(found[other], entropy[other], rtol=1e-5)


@both_sets
@every_head
def test_a_step_trains_all_layers_and_in_micro_batches_the_same(name, class_set):
    _, model, start, batch, constants = build(name, class_set)
    states, sums = {}, {}
    for parts in (1, 2):
        step = jax.jit(make_step(name, model, micro_batches=parts))
        state = train_step.state_of(start, OPTIMIZER)
        states[parts], sums[parts] = step(state, batch, jax.random.key(0), HYPER, constants)
    assert np.isfinite(sums[1]["loss"]) and sums[1]["loss"] > 0 and sums[1]["count"] == B
    tiny.assert_close(states[2].params, states[1].params)
    np.testing.assert_allclose(sums[2]["loss"], sums[1]["loss"], rtol=1e-5)
    for layer in start:
        for part, before in start[layer].items():
            after = np.asarray(states[1].params[layer][part])
            assert np.any(after != before)
            real = np.isfinite(before)  # a padded class has a bias of -inf, which stays
            assert np.isfinite(after[real]).all() and (after[~real] == -np.inf).all()


@every_head
def test_training_lowers_the_loss(name):
    _, model, start, batch, constants = build(name)
    step = jax.jit(make_step(name, model))
    state, found = train_step.state_of(start, OPTIMIZER), []
    for _ in range(30):
        state, sums = step(state, batch, jax.random.key(0), HYPER, constants)
        found.append(float(sums["loss"]))
    assert found[-1] < 0.9 * found[0]
