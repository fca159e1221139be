"""The forms of a specialist's output: how each starts, is trained, and is read."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ml_collections import ConfigDict

from distill_jax import losses, models, optimizers, train_step
from distill_jax.epochs import take_rows
from distill_jax.errors import UserError
from distill_jax.specialists import enrichment
from experiments.common import members, sections
from experiments.specialists.kinds import KINDS, kind_of, make_gather
from experiments.specialists.training import count_errors

N, B, C, D = 60, 16, 7, 5
SET = np.array([1, 4, 6], np.int32)
PADDED = np.array([2, 5, C], np.int32)
S = len(SET)
GENERALIST = models.mlp([8], C)
OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))
HYPER = tiny.hyper(learning_rate=0.05, temperature=2.0)
every_kind = pytest.mark.parametrize("name", list(KINDS))
both_sets = pytest.mark.parametrize("class_set", [SET, PADDED], ids=["whole", "padded"])


def generalist_params(seed=0):
    """Weights and biases, large enough for its predictions to be far from uniform."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(GENERALIST.init, jax.random.key(0), jnp.zeros((1, D)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32), shapes
    )


def make_examples(class_set=SET, seed=1):
    random = np.random.default_rng(seed)
    return {
        "inputs": jnp.asarray(random.standard_normal((N, D)), jnp.float32),
        "label": jnp.asarray(np.append(np.arange(C), random.integers(0, C, N - C)), jnp.int32),
        "class_set": jnp.asarray(class_set),
        "targets": enrichment.dustbin_labels(jnp.asarray(class_set), C),
        "generalist": generalist_params(),
    }


def build(name, class_set=SET):
    """The kind, its network, what this starts from, and a batch of its examples."""
    kind, examples = kind_of(name), make_examples(class_set)
    model = models.mlp([8], kind.outputs(S, C))
    start = kind.start(examples["generalist"], examples["class_set"], C)
    rows = jnp.arange(B, dtype=jnp.int32) * 3
    return kind, model, start, make_gather(kind, GENERALIST)(examples, rows)


def generalist_logits(inputs):
    return GENERALIST.apply(generalist_params(), inputs)


def test_no_other_kind():
    with pytest.raises(UserError, match="of unit, logsumexp, full_hard, full_soft, not 'one'"):
        kind_of("one")


@every_kind
def test_the_start_fits_the_network(name):
    _, model, start, batch = build(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["inputs"])
    tiny.assert_equal(
        jax.tree.map(lambda leaf: leaf.shape, start), jax.tree.map(lambda leaf: leaf.shape, shapes)
    )
    tiny.assert_equal(start["hidden_0"], generalist_params()["hidden_0"])


@both_sets
def test_a_dustbin_of_many_outputs_starts_as_the_generalist(class_set):
    kind, model, start, batch = build("logsumexp", class_set)
    logits = generalist_logits(batch["inputs"])
    found = kind.read(model.apply(start, batch["inputs"]), jnp.asarray(class_set), jnp.float32(0.0))
    tiny.assert_equal(found, enrichment.collapse(logits, jnp.asarray(class_set)))
    # The same from the generalist's probabilities, summed by numpy.
    p = np.asarray(jax.nn.softmax(np.asarray(logits, np.float64)))
    real = class_set[class_set < C]
    expected = np.zeros((B, S + 1))
    expected[:, : len(real)] = p[:, real]
    expected[:, S] = np.delete(p, real, axis=1).sum(axis=1)
    np.testing.assert_allclose(jax.nn.softmax(found), expected, rtol=1e-5, atol=1e-7)


@both_sets
def test_one_unit_starts_with_the_generalists_special_logits(class_set):
    kind, model, start, batch = build("unit", class_set)
    logits = np.asarray(generalist_logits(batch["inputs"]), np.float64)
    found = kind.read(model.apply(start, batch["inputs"]), jnp.asarray(class_set), jnp.float32(0.0))
    real = class_set[class_set < C]
    np.testing.assert_allclose(found[:, : len(real)], logits[:, real], rtol=1e-5, atol=1e-5)
    assert (np.asarray(found[:, len(real) : S]) == -np.inf).all()
    others = np.delete(logits, real, axis=1)
    expected = others.mean(axis=1) + np.log(others.shape[1])
    np.testing.assert_allclose(found[:, S], expected, rtol=1e-5, atol=1e-5)


@both_sets
@pytest.mark.parametrize("name", ["full_hard", "full_soft"])
def test_a_full_softmax_starts_as_the_generalist(name, class_set):
    kind, model, start, batch = build(name, class_set)
    found = kind.read(model.apply(start, batch["inputs"]), jnp.asarray(class_set), jnp.float32(0.0))
    tiny.assert_equal(found[:, :C], generalist_logits(batch["inputs"]))


@both_sets
@every_kind
def test_what_is_read_is_corrected_outside_the_set_alone(name, class_set):
    kind, model, start, batch = build(name, class_set)
    logits, class_set = model.apply(start, batch["inputs"]), jnp.asarray(class_set)
    plain, corrected = (kind.read(logits, class_set, jnp.float32(c)) for c in (0.0, 0.75))
    outputs = S + 1 if kind.has_dustbin else C + 1
    assert corrected.shape == (B, outputs) and corrected.dtype == jnp.float32
    if kind.has_dustbin:
        outside = np.arange(outputs) == S
    else:
        outside = ~np.isin(np.arange(outputs), class_set)
        assert (np.asarray(corrected[:, C]) == -np.inf).all()  # there is no dustbin
    expected = np.where(outside, np.asarray(plain) + 0.75, plain)
    np.testing.assert_allclose(corrected, expected, rtol=1e-6, atol=1e-6)


@every_kind
def test_many_specialists_are_read_at_once_as_each_alone(name):
    kind, model, start, batch = build(name)
    logits = model.apply(start, batch["inputs"])
    sets, corrections = jnp.stack([SET, PADDED]), jnp.array([0.5, -1.0])
    found = jax.vmap(kind.read)(jnp.stack([logits, 2 * logits]), sets, corrections)
    assert found.shape[:2] == (2, B)
    for m, scaled in enumerate((logits, 2 * logits)):
        expected = kind.read(scaled, sets[m], corrections[m])
        np.testing.assert_allclose(found[m], expected, rtol=1e-6, atol=1e-6)
    three = logits.reshape(4, B // 4, -1)  # more axes in front
    expected = kind.read(logits, sets[0], corrections[0]).reshape(4, B // 4, -1)
    np.testing.assert_allclose(kind.read(three, sets[0], corrections[0]), expected, rtol=1e-6)


def test_batches_have_what_their_loss_reads():
    examples, batches = make_examples(), {name: build(name)[3] for name in KINDS}
    label = np.asarray(examples["label"])[np.arange(B) * 3]
    for name, batch in batches.items():
        tiny.assert_equal(batch["inputs"], np.asarray(examples["inputs"])[np.arange(B) * 3])
        if name != "unit":
            tiny.assert_equal(batch["label"], label)
    places = [list(SET).index(one) if one in SET else S for one in label]
    tiny.assert_equal(batches["unit"]["label"], np.array(places, np.int32))
    tiny.assert_equal(batches["logsumexp"]["class_set"], np.tile(SET, (B, 1)))
    tiny.assert_equal(batches["full_soft"]["is_special"], np.isin(label, SET))
    assert sorted(batches["full_hard"]) == ["inputs", "label"]


def test_soft_targets_are_the_generalists_logits_whatever_the_specialist():
    kind, model, start, batch = build("full_soft")
    tiny.assert_equal(batch["teacher_logits"], generalist_logits(batch["inputs"]))
    # No gradient flows back into it.
    examples = make_examples()

    def total(params):
        rows = jnp.arange(B, dtype=jnp.int32)
        batch = make_gather(kind, GENERALIST)({**examples, "generalist": params}, rows)
        return jnp.sum(batch["teacher_logits"])

    gradient = jax.grad(total)(examples["generalist"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    # At its start it agrees with the teacher on other classes: the loss is the teacher's entropy.
    p = losses.softmax(batch["teacher_logits"], HYPER["temperature"])
    entropy = -jnp.sum(p * jnp.log(p), axis=-1) * HYPER["temperature"] ** 2
    found = kind.loss(model.apply(start, batch["inputs"]), batch, HYPER)
    other = ~np.asarray(batch["is_special"])
    assert other.any() and not other.all()
    np.testing.assert_allclose(found[other], entropy[other], rtol=1e-5)


@both_sets
@every_kind
def test_a_step_trains_all_layers_and_in_micro_batches_the_same(name, class_set):
    kind, model, start, batch = build(name, class_set)
    states, sums = {}, {}
    for parts in (1, 2):
        step = jax.jit(train_step.make_train_step(model, OPTIMIZER, kind.loss, micro_batches=parts))
        state = train_step.state_of(start, OPTIMIZER)
        states[parts], sums[parts] = step(state, batch, jax.random.key(0), HYPER)
    assert np.isfinite(sums[1]["loss"]) and sums[1]["loss"] > 0 and sums[1]["count"] == B
    tiny.assert_close(states[2].params, states[1].params)
    np.testing.assert_allclose(sums[2]["loss"], sums[1]["loss"], rtol=1e-5)
    for layer in start:
        for part, before in start[layer].items():
            after = np.asarray(states[1].params[layer][part])
            assert np.any(after != before)
            real = np.isfinite(before)  # a padded class has a bias of -inf, which stays
            assert np.isfinite(after[real]).all() and (after[~real] == -np.inf).all()


@every_kind
def test_training_lowers_the_loss(name):
    kind, model, start, batch = build(name)
    step = jax.jit(train_step.make_train_step(model, OPTIMIZER, kind.loss))
    state, found = train_step.state_of(start, OPTIMIZER), []
    for _ in range(30):
        state, sums = step(state, batch, jax.random.key(0), HYPER)
        found.append(float(sums["loss"]))
    assert found[-1] < 0.9 * found[0]


M, OWN_SETS = 2, (SET, PADDED)


def net(**changes):
    recipe = {"batch_size": 8, "epochs": 2, "save_every": 1, "warmup_epochs": 0}
    return ConfigDict(sections.net(**{**recipe, **changes}))


def train(directory, examples, start, evaluation=None, cases=members.PLAIN, **changes):
    mesh = {"member": 2, "data": 4, "model": 1}
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic promotes
        return members.train(
            net(**changes),
            ConfigDict({"seeds": (0, 1), "selection": "last", "mesh": mesh}),
            directory,
            "test",
            GENERALIST,
            examples,
            train_step.label_loss,
            evaluation=evaluation or {},
            cases=cases,
            start=start,
        )


def plain_examples():
    return {name: np.asarray(make_examples()[name]) for name in ("inputs", "label")}


def two_starts():
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(generalist_params, range(M)))


def test_members_start_from_the_parameters_given(tmp_path):
    start = two_starts()
    kept = jax.device_get(start)
    trained = train(tmp_path / "still", [plain_examples()] * M, start, learning_rate=0.0)
    tiny.assert_equal(jax.device_get(trained.params), kept)
    assert np.ravel(trained.history[-1]["step"])[0] == 2 * (N // 8)  # it did train
    moved = train(tmp_path / "moved", [plain_examples()] * M, start, learning_rate=1e-3)
    for found, before in zip(jax.tree.leaves(moved.params), jax.tree.leaves(kept), strict=True):
        distance = np.abs(np.asarray(found) - before)
        # Numbers of deviation 1 that other starts don't share.
        assert (distance.reshape(M, -1).max(axis=1) > 0).all() and distance.max() < 0.1
    tiny.assert_equal(jax.device_get(start), kept)  # training leaves them to their owner


def test_own_evaluation_examples_are_counted_as_one_by_one(tmp_path):
    """Other images for each member, and fields that both share."""
    start, shared = two_starts(), np.arange(N, dtype=np.int32) % C
    own = [
        {"inputs": np.asarray(make_examples(seed=10 + m)["inputs"]), "label": shared}
        for m in range(M)
    ]
    trained = train(
        tmp_path,
        [plain_examples()] * M,
        start,
        {"own_errors": own, "shared_errors": own[1]},
    )
    for m in range(M):
        for name, one in (("own_errors", own[m]), ("shared_errors", own[1])):
            wrong = trained.logits(m, one["inputs"]).argmax(axis=1) != one["label"]
            assert trained.history[-1][name][m] == wrong.sum() > 0


@pytest.mark.parametrize("special", [True, False])
def test_restricted_errors_of_each_members_own_classes(tmp_path, special):
    """As while specialists learn: shared images, and each its own classes to choose among."""
    examples = plain_examples()
    own = []
    for class_set in OWN_SETS:
        allowed = np.isin(np.arange(C), class_set) == special
        counted = allowed[examples["label"]]
        wanted = {"allowed": allowed, "wanted": examples["label"], "counted": counted}
        own.append({"inputs": examples["inputs"], **wanted})
    cases = members.Reader(take_rows, count_errors)
    trained = train(tmp_path, [examples] * M, two_starts(), {"test_errors": own}, cases)
    for m, one in enumerate(own):
        logits = np.where(one["allowed"], trained.logits(m, one["inputs"]), -np.inf)
        wrong = logits.argmax(axis=1) != one["wanted"]
        expected = wrong[one["counted"]].sum()
        assert trained.history[-1]["test_errors"][m] == expected
        alone = count_errors(
            GENERALIST, jax.tree.map(lambda leaf, m=m: leaf[m], trained.params), one
        )
        assert alone == expected > 0
