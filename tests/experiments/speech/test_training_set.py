"""The training set resident and streamed, and soft targets made of it, in this process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speech_configs import config_of

from distill_jax import sharding, soft_targets
from distill_jax.errors import UserError
from distill_jax.nets import Net
from experiments.common import training
from experiments.common.study import Context
from experiments.speech import frames, nets, programs, recognition, table1, training_set
from experiments.speech.data import load_data


@pytest.fixture(scope="module")
def resident():
    return config_of()


@pytest.fixture(scope="module")
def streamed():
    return config_of(block_frames=1500)


@pytest.fixture(scope="module")
def ensemble(resident):
    data = load_data(resident)
    model = training.build_model(resident.ensemble, data.num_classes, data.byte)
    keys = jax.random.split(jax.random.key(0), 3)
    params = jax.vmap(lambda key: model.init(key, jnp.zeros((1, 26, 40), jnp.uint8)))(keys)
    return Net(model, params, [], 0.0, 3, {})


@pytest.fixture(scope="module")
def store(resident, ensemble, tmp_path_factory):
    context = Context(resident, tmp_path_factory.mktemp("soft_targets"), {})
    nets.write_targets(context, "s", ensemble, (1.0, 2.0), mean="arithmetic", teacher="teacher")
    return nets.load_targets(resident, context.directory / "s")


def test_classes_priors_and_phones(resident):
    data = load_data(resident)
    assert data.train["label"].max() < data.num_classes == len(data.log_prior)
    assert np.exp(data.log_prior.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    phones = np.array(data.corpus.metadata["phones"])
    for number in range(data.num_classes):
        assert len(set(phones[data.class_of_state == number])) == 1


def test_the_programs_for_machines_that_are_not_there_are_of_blocks(streamed):
    read = training_set.labelled(streamed, streamed.ensemble, 1)
    block = read.put(next(read.open_blocks(0)), sharding.make_mesh())
    listed = list(programs.programs(streamed))
    one = next(one for stage, one in listed if stage == "ensemble")
    assert {name: (x.shape, x.dtype) for name, x in block.items()} == {
        name: (x.shape, x.dtype) for name, x in one.fields.items()
    }
    assert (read.steps, read.inputs) == (one.blocks.steps, one.blocks.inputs)
    resident = {stage for stage, one in listed if not one.blocks}
    assert resident == {"compression", "fractions"}


def test_streamed_is_the_same_set(resident, streamed):
    one, other = load_data(resident), load_data(streamed)
    assert other.train == {} and one.fingerprint == other.fingerprint
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_array_equal(one.log_prior, other.log_prior)
    size = int(one.lengths.sum())
    for rows in (np.arange(size), np.array([0, 1, 1, 700, size - 1, size - 1])):
        np.testing.assert_array_equal(
            training_set.windows(resident, rows), training_set.windows(streamed, rows)
        )


def test_digests_of_a_streamed_set(resident, streamed, monkeypatch):
    monkeypatch.setattr(training_set, "_DIGESTS", {})
    monkeypatch.setattr(training_set, "_CHUNK", 701)
    found = training_set.digests(streamed)
    np.testing.assert_array_equal(found, frames.digests(load_data(resident).train))


def test_a_store_of_one_pass_holds_each_temperatures_targets(resident, ensemble, store):
    data = load_data(resident)
    rows = np.arange(len(data.train["label"]))
    windows = training_set.windows(resident, rows)
    logits = jax.lax.map(lambda params: ensemble.model.apply(params, windows), ensemble.params)
    for temperature in (1.0, 2.0):
        mean = jnp.exp(soft_targets.mean_log_probs(logits, temperature, "arithmetic"))
        found = soft_targets.rows(store, rows, temperature)
        _, probabilities, tail = soft_targets.top_k(mean, resident.soft_targets.k)
        np.testing.assert_allclose(
            found["teacher_probabilities"].astype(np.float32),
            probabilities.astype(jnp.float32),
            rtol=0.01,
        )
        np.testing.assert_allclose(found["teacher_tail"], tail, atol=1e-5)
        weights = store.tail_weights[temperature]
        np.testing.assert_allclose(weights, mean.mean(axis=0), atol=1e-6)


def test_streamed_utterances_carry_their_own_targets(streamed, store):
    data = load_data(streamed)
    source = training_set.Utterances(data, store, 2.0)
    first = int(data.lengths[0])
    item = source[1]
    expected = soft_targets.rows(store, np.arange(first, first + len(item["states"])), 2.0)
    for name, field in expected.items():
        np.testing.assert_array_equal(item[name], field)
    stream = training_set.with_targets(streamed, streamed.distilled, store, 2.0, 1)
    block = next(stream.open_blocks(0))
    real = block["id"] >= 0
    expected = soft_targets.rows(store, block["id"][real], 2.0)
    np.testing.assert_array_equal(block["teacher_ids"][real], expected["teacher_ids"])
    with pytest.raises(
        UserError, match=r"temperature 1\.0 and 2\.0 and can't be used at temperature 5"
    ):
        training_set.with_targets(streamed, streamed.distilled, store, 5.0, 1)


@pytest.mark.parametrize("name", ["resident", "streamed"])
def test_random_parts(name, request, store):
    config = request.getfixturevalue(name)
    whole = load_data(config_of()).train
    parts = training_set.random_parts(config, 20.0, (0, 1))
    assert len(parts[0]["label"]) == len(parts[1]["label"])
    assert parts[0]["frames"] is parts[1]["frames"]
    assert set(parts[0]["id"]) != set(parts[1]["id"])
    for cases in parts:
        assert 0.05 < len(cases["id"]) / len(whole["id"]) < 0.35
        np.testing.assert_array_equal(cases["label"], whole["label"][cases["id"]])
        np.testing.assert_array_equal(
            frames.digests(cases), frames.digests(frames.select(whole, cases["id"]))
        )
        joined = training_set.part_with_targets(config, cases, store, 2.0)
        expected = soft_targets.rows(store, cases["id"], 2.0)
        np.testing.assert_array_equal(joined["teacher_ids"], expected["teacher_ids"])


def test_stores_are_bound_to_alignment_and_classes(resident, store, tmp_path):
    other = config_of()
    other.data.min_frames = 500
    soft_targets.write(
        tmp_path / "store",
        lambda rows: jnp.full((len(rows), 4), 0.25),
        training_set.digests(resident)[:10],
        teacher="someone",
        data={"alignment": load_data(resident).fingerprint},
        encoding="top_k",
        k=2,
        temperatures=1.0,
        probabilities=True,
        num_classes=4,
    )
    with pytest.raises(
        UserError, match=f"num_classes is 4 there and {load_data(resident).num_classes} now"
    ):
        nets.load_targets(resident, tmp_path / "store")
    assert load_data(other).fingerprint != store.meta["data"]["alignment"]
    with pytest.raises(UserError, match="alignment"):
        nets.load_targets(other, tmp_path / "store")


def test_ensemble_log_probs_and_accuracy(resident, ensemble):
    data = load_data(resident)
    found = nets.log_probs(ensemble, data.test)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-4)
    single = [nets.log_probs(ensemble.some(m, 1), data.test) for m in range(3)]
    np.testing.assert_allclose(np.exp(found), np.exp(single).mean(axis=0), atol=1e-6)
    expected = [nets.accuracy(one.argmax(axis=-1), data.test) for one in single]
    np.testing.assert_allclose(nets.accuracies(ensemble, data.test), expected, rtol=1e-5)
    states, geometric = table1.states_of_means(ensemble, data)
    assert {size: len(each) for size, each in states.items()} == {1: 3, 2: 1, 3: 1}
    for each, of in (
        (states[1][2], single[2:]),
        (states[2][0], single[:2]),
        (states[3][0], single),
    ):
        np.testing.assert_array_equal(each, np.exp(of).mean(axis=0).argmax(axis=-1))
    np.testing.assert_array_equal(geometric, np.mean(single, axis=0).argmax(axis=-1))


def test_words_to_decode_and_to_learn_from(resident):
    data = load_data(resident)
    spoken = data.corpus.splits["test"]
    some = recognition.first_words(spoken, 20)
    assert 0 < sum(len(one.words) for one in some) <= 20
    assert recognition.first_words(spoken, 0) == list(spoken)
    assert recognition.first_words(spoken, 1)[:1] == list(spoken[:1])
    lines = recognition.training_transcripts(data)
    assert len(lines) > len(data.corpus.splits["train"])
    assert lines[0] == data.corpus.splits["train"][0].words
