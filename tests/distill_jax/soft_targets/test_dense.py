"""Soft targets: the ensemble's means, the store, and joining by id."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import losses, models, soft_targets
from distill_jax.data.augment import jitter
from distill_jax.errors import UserError

N = 12


def log_probs64(logits, temperature):
    z = np.asarray(logits, np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def mean64(logits, temperature, mean):
    log_probs = log_probs64(logits, temperature)
    if mean == "arithmetic":
        top = log_probs.max(0)
        return top + np.log(np.exp(log_probs - top).mean(0))
    return log_probs64(log_probs.mean(0), 1.0)


def make(**kwargs):
    return soft_targets.make(tiny.teacher_logits(N), tiny.examples(N), "abc", **kwargs)


def take(examples, rows):
    return {name: field[rows] for name, field in examples.items()}


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@settings(deadline=None, max_examples=20)
@given(st.floats(0.5, 100, width=32), st.sampled_from([1.0, 10.0, 3000.0]), st.integers(0, 2**31))
def test_means_are_those_of_float64(mean, temperature, scale, seed):
    random = np.random.default_rng(seed)
    logits = (scale * random.standard_normal((5, 3, 4))).astype(np.float32)
    expected = mean64(logits, temperature, mean)
    found = soft_targets.mean_log_probs(jnp.asarray(logits), temperature, mean)
    # Logarithms down to -20000, many of probabilities that are 0 in float32. Each is a difference of
    # numbers of the logits' size, which are rounded: twice, of a geometric mean.
    rounding = 2 * np.finfo(np.float32).eps * np.abs(logits).max() / temperature
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 + rounding)
    probabilities = soft_targets.mean_probs(jnp.asarray(logits), temperature, mean)
    np.testing.assert_allclose(probabilities, np.exp(expected), rtol=1e-5, atol=1e-6)
    merged = soft_targets.ensemble_logits(jnp.asarray(logits), temperature, mean)
    again = losses.log_softmax(merged, temperature)
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_geometric_mean_is_the_softmax_of_mean_logits(temperature):
    logits = jnp.asarray(tiny.teacher_logits(20).reshape(5, 4, 3))
    log_probs = soft_targets.mean_log_probs(logits, temperature, "geometric")
    expected = losses.softmax(jnp.mean(logits, axis=0), temperature)
    np.testing.assert_allclose(jnp.exp(log_probs), expected, rtol=1e-5)


def test_unknown_mean():
    with pytest.raises(UserError, match="'arithmetic' or 'geometric', not 'median'"):
        soft_targets.mean_log_probs(jnp.zeros((2, 3)), 1.0, "median")


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12, 1000])
def test_logits_over_is_the_model_in_evaluation_mode(key, batch_size):
    model = models.mlp([5], 3, input_dropout=0.5, hidden_dropout=0.5)
    images = tiny.examples(N)["inputs"]
    params = model.init(key, jnp.asarray(images))
    found = soft_targets.logits_over(model.apply, params, images, batch_size)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_allclose(found, model.apply(params, images), rtol=1e-5, atol=1e-6)


def test_logits_over_is_one_program_for_all_batches_and_teachers():
    traces = []

    def apply(params, inputs):
        traces.append(inputs.shape)
        return inputs.reshape(len(inputs), -1)[:, :3] * params

    images = np.ones((10, 2, 2), np.float32)
    for scale in (1.0, 2.0):
        found = soft_targets.logits_over(apply, jnp.float32(scale), images, 4)
        np.testing.assert_array_equal(found, np.full((10, 3), scale))
    assert traces == [(4, 2, 2)]


def test_attach_joins_by_id():
    targets = make()
    for rows in (np.arange(N), np.arange(N)[::-1], np.array([7, 2, 9])):
        joined = soft_targets.attach(take(tiny.examples(N), rows), targets)
        np.testing.assert_array_equal(joined["teacher_logits"], tiny.teacher_logits(N)[rows])
        np.testing.assert_array_equal(joined["id"], tiny.examples(N)["id"][rows])


def test_attach_to_a_store_that_is_not_sorted():
    rows = np.random.default_rng(0).permutation(N)
    examples = take(tiny.examples(N), rows)
    targets = soft_targets.make(tiny.teacher_logits(N)[rows], examples, "abc")
    joined = soft_targets.attach(tiny.examples(N), targets)
    np.testing.assert_array_equal(joined["teacher_logits"], tiny.teacher_logits(N))


@pytest.mark.parametrize("stranger", [5, 105.5, 900])
def test_attach_to_an_id_without_targets(stranger):
    examples, stored = tiny.examples(N), np.arange(N) != 5
    targets = soft_targets.make(tiny.teacher_logits(N)[stored], take(examples, stored), "abc")
    changed = {**examples, "id": examples["id"].copy()}
    changed["id"][5] = stranger
    message = (
        f"1 of 12 examples have no soft targets, first id {int(stranger)}; .*11 of teacher abc"
    )
    with pytest.raises(UserError, match=message):
        soft_targets.attach(changed, targets)


def test_attach_to_changed_images():
    examples = tiny.examples(N)
    examples["inputs"][3, 0, 0] ^= 1
    with pytest.raises(UserError, match=r"1 of 12 .* teacher abc saw .* first id 103"):
        soft_targets.attach(examples, make())


def test_attach_to_images_under_swapped_ids():
    examples = tiny.examples(N)
    examples["id"][[2, 4]] = examples["id"][[4, 2]]
    with pytest.raises(UserError, match=r"2 of 12 examples are not the inputs"):
        soft_targets.attach(examples, make())


def test_attach_to_jittered_images(key):
    moved = jitter(2)({name: jnp.asarray(x) for name, x in tiny.examples(N).items()}, key)
    with pytest.raises(UserError, match="make them again"):
        soft_targets.attach({name: np.asarray(x) for name, x in moved.items()}, make())


def test_attach_at_another_temperature():
    mixed = make(temperature=4.0, mean="arithmetic")
    with pytest.raises(UserError, match=r"arithmetic mean at temperature 4.0 .* temperature 8.0"):
        soft_targets.attach(tiny.examples(N), mixed, temperature=8.0)
    for targets, temperature in ((mixed, 4.0), (mixed, None), (make(mean="geometric"), 8.0)):
        joined = soft_targets.attach(tiny.examples(N), targets, temperature)
        np.testing.assert_array_equal(joined["teacher_logits"], tiny.teacher_logits(N))


def test_make_refuses_what_does_not_fit():
    logits, examples = tiny.teacher_logits(N), tiny.examples(N)
    with pytest.raises(UserError, match="11 rows of logits for 12 examples"):
        soft_targets.make(logits[:-1], examples, "abc")
    repeated = {**examples, "id": np.full(N, 7)}
    with pytest.raises(UserError, match="distinct ids"):
        soft_targets.make(logits, repeated, "abc")
    for bad in (np.nan, np.inf, -np.inf):
        broken = logits.copy()
        broken[4, 1] = bad
        with pytest.raises(UserError, match="not finite, first for example 104"):
            soft_targets.make(broken, examples, "abc")


def assert_same(found, expected):
    assert found.meta == expected.meta
    for name in ("ids", "digests", "logits"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype


@pytest.mark.parametrize("meta", [{}, {"temperature": 4.0, "mean": "arithmetic"}])
def test_a_store_comes_back_as_it_was(tmp_path, meta):
    soft_targets.save(tmp_path / "store", make(**meta))
    assert_same(soft_targets.load(tmp_path / "store", "abc", tiny.CLASSES), make(**meta))


def test_load_refuses_another_teacher_class_count_and_version(tmp_path):
    soft_targets.save(tmp_path, make())
    with pytest.raises(UserError, match="of teacher abc, not of xyz"):
        soft_targets.load(tmp_path, teacher="xyz")
    with pytest.raises(UserError, match="have 3 classes, not 10"):
        soft_targets.load(tmp_path, num_classes=10)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "version": 2}))
    with pytest.raises(UserError, match=r"version 2; this program reads .* version 1"):
        soft_targets.load(tmp_path)


def test_load_of_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(UserError, match=f"no readable soft targets in {re.escape(str(tmp_path))}"):
        soft_targets.load(tmp_path)


def test_any_flipped_bit_in_the_logits_is_noticed(tmp_path):
    soft_targets.save(tmp_path, make())
    path = tmp_path / "logits.npy"
    good = path.read_bytes()
    unnoticed = []
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert_same(soft_targets.load(tmp_path), make())
        except UserError:
            continue
        except AssertionError:
            unnoticed.append(bit)
    assert unnoticed == []


@pytest.mark.parametrize("name", ["ids.npy", "digests.npy", "logits.npy", "meta.json"])
@pytest.mark.parametrize("kept", [0, 20, 0.5, -1])
def test_a_cut_file_is_noticed(tmp_path, name, kept):
    soft_targets.save(tmp_path, make())
    content = (tmp_path / name).read_bytes()
    size = int(kept * len(content)) if isinstance(kept, float) else kept
    (tmp_path / name).write_bytes(content[:size])
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        soft_targets.load(tmp_path)


def test_save_replaces_a_store_and_what_a_killed_save_left(tmp_path):
    soft_targets.save(tmp_path / "store", make())
    left = tmp_path / "store.partial"
    left.mkdir()
    (left / "logits.npy").write_bytes(b"half")
    with_mean = make(temperature=2.0, mean="arithmetic")
    assert_same(soft_targets.load(tmp_path / "store"), make())
    soft_targets.save(tmp_path / "store", with_mean)
    assert_same(soft_targets.load(tmp_path / "store"), with_mean)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_fingerprint_names_parameters_and_config(key):
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    name = soft_targets.fingerprint(params, {"hidden": [1], "seed": 0})
    assert re.fullmatch("[0-9a-f]{16}", name)
    assert soft_targets.fingerprint(
        jax.tree.map(np.asarray, params), {"seed": 0, "hidden": [1]}
    ) == (name)
    others = [
        soft_targets.fingerprint({**params, "b": jnp.full(3, 1e-9)}, {"hidden": [1], "seed": 0}),
        soft_targets.fingerprint({**params, "a": jnp.ones((3, 2))}, {"hidden": [1], "seed": 0}),
        soft_targets.fingerprint(params, {"hidden": [1], "seed": 1}),
    ]
    assert len({name, *others}) == 4
