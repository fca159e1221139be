"""Trained specialists on disk: they come back as they were, or not at all."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import files, models
from distill_jax.errors import UserError
from distill_jax.models import Model
from distill_jax.nets import Net
from distill_jax.specialists import heads, inference, store

C = 9
SETS = np.array([[1, 4, 7], [0, 8, C]], np.int32)
FILES = ["class_sets.npy", "corrections.npy", "net.json", "params.npz", "specialists.json"]
MODEL = models.mlp([5], 4)


def specialists(seed=0, params=None, **changes):
    keys = jax.random.split(jax.random.key(seed), 2)
    made = jax.vmap(lambda key: MODEL.init(key, jnp.zeros((1, 3))))(keys)
    net = Net(MODEL, made if params is None else params, [], 1.5, 2, {})
    corrections = np.array([2.5, 0.5], np.float32)
    found = store.Specialists(net, heads.UNIT, SETS, corrections, C, generalist="abc", data="def")
    return found._replace(**changes)


def assert_same(found, expected):
    assert found.net.model is expected.net.model and found.net.seconds == expected.net.seconds
    assert (found.head, *found[4:]) == (expected.head, *expected[4:])
    arrays, wanted = (
        (one.net.params, one.class_sets, one.corrections) for one in (found, expected)
    )
    assert jax.tree.structure(arrays) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(arrays), jax.tree.leaves(wanted), strict=True):
        assert isinstance(x, np.ndarray) and x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_specialists_come_back_as_they_were(tmp_path):
    store.save(tmp_path / "store", specialists())
    found = store.load(str(tmp_path / "store"), generalist="abc", data="def", num_classes=C)
    assert_same(found, specialists())
    assert_same(store.load(tmp_path / "store"), specialists())
    random = np.random.default_rng(0)
    logits = random.standard_normal((20, C)).astype(np.float32)
    inputs = random.standard_normal((20, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        inference.predict(found, logits, inputs), inference.predict(specialists(), logits, inputs)
    )


def test_a_model_of_your_own_is_handed_to_load(tmp_path):
    own = Model(MODEL.init, lambda params, inputs: MODEL.apply(params, inputs))
    saved = specialists()
    store.save(tmp_path / "own", saved._replace(net=saved.net._replace(model=own)))
    with pytest.raises(UserError, match="has a model of your own"):
        store.load(tmp_path / "own")
    assert store.load(tmp_path / "own", model=own).net.model is own


def test_other_programs_need_only_numpy_and_json(tmp_path):
    directory = tmp_path / "some" / "store"
    store.save(directory, specialists())
    assert sorted(path.name for path in directory.iterdir()) == FILES
    params = np.load(directory / "params.npz")
    assert set(params) == {"hidden_0/kernel", "hidden_0/bias", "output/kernel", "output/bias"}
    np.testing.assert_array_equal(
        params["hidden_0/kernel"], specialists().net.params["hidden_0"]["kernel"]
    )
    np.testing.assert_array_equal(np.load(directory / "class_sets.npy"), SETS)
    meta = json.loads((directory / "specialists.json").read_text())
    expected = {"head": "unit", "generalist": "abc", "data": "def", "num_classes": C}
    assert expected.items() <= meta.items()


def test_dtypes_that_numpy_has_not_come_back(tmp_path):
    leaves = {
        "bfloat16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7,
        "float8": jnp.arange(2, dtype=jnp.float8_e4m3fn),
        "float16": jnp.ones((2, 3), jnp.float16),
        "int8": np.array([[-1], [5]], np.int8),
        "strided": np.arange(8.0)[::4],
    }
    saved = specialists(params={"deep": {"er": leaves}, "flat": np.zeros(2)})
    store.save(tmp_path / "store", saved)
    assert_same(store.load(tmp_path / "store"), saved)
    params = np.load(tmp_path / "store" / "params.npz")
    assert params["deep/er/bfloat16"].dtype == np.uint16


def test_load_refuses_what_is_not_expected(tmp_path):
    store.save(tmp_path / "store", specialists())
    for name, there, now in (
        ("generalist", "abc", "xyz"),
        ("data", "def", "uvw"),
        ("num_classes", 9, 10),
    ):
        expected = rf"another training: {name} is {there!r} there and {now!r} now$"
        with pytest.raises(UserError, match=expected):
            store.load(tmp_path / "store", **{name: now})
    with pytest.raises(
        UserError, match=r"data is 'def' there .* num_classes is 9 there and 10 now"
    ):
        store.load(tmp_path / "store", generalist="abc", data="uvw", num_classes=10)


@pytest.mark.parametrize("name,value", [("version", 3), ("format", "distill_jax.soft_targets")])
def test_load_refuses_another_version_and_format(tmp_path, name, value):
    store.save(tmp_path / "store", specialists())
    path = tmp_path / "store" / "specialists.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UserError, match=f"{value}.*; this program reads .* version 2"):
        store.load(tmp_path / "store")


@pytest.mark.parametrize("name", FILES)
def test_any_changed_byte_is_noticed(tmp_path, name):
    directory = tmp_path / "store"
    store.save(directory, specialists())
    good = (directory / name).read_bytes()
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        (directory / name).write_bytes(damaged)
        try:
            found = store.load(directory)
        except UserError as error:
            assert str(directory) in str(error)
        else:  # one kind of blank between JSON's words for another
            assert name == "specialists.json" and chr(good[place]).isspace()
            assert_same(found, specialists())


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_missing_file_is_noticed(tmp_path, name):
    directory = tmp_path / "store"
    store.save(directory, specialists())
    good = (directory / name).read_bytes()
    for kept in (0, 20, len(good) // 2, len(good) - 2):
        (directory / name).write_bytes(good[:kept])
        with pytest.raises(UserError, match=f"{re.escape(str(directory))}.*damaged"):
            store.load(directory)
    (directory / name).unlink()
    with pytest.raises(UserError, match=re.escape(str(directory))):
        store.load(directory)


class Killed(BaseException):
    """Not an error that a program could handle."""


def killed_saves(monkeypatch, directory, saved):
    """Saves that end before each of their calls to write something."""
    for module, name in [(np, "savez"), (np, "save"), (files, "write_json"), (os, "replace")]:

        def stop(*arguments, **options):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            with pytest.raises(Killed):
                store.save(directory, saved, overwrite=True)
        yield name


def test_a_killed_save_leaves_nothing_or_the_earlier_specialists(tmp_path, monkeypatch):
    directory = tmp_path / "store"
    for _ in killed_saves(monkeypatch, directory, specialists()):
        with pytest.raises(UserError, match=r"can't be read.*; train the specialists again"):
            store.load(directory)
    store.save(directory, specialists())
    for _ in killed_saves(monkeypatch, directory, specialists(seed=1, data="other")):
        assert_same(store.load(directory), specialists())
    with pytest.raises(UserError, match="holds other specialists: data is 'def' there and 'other'"):
        store.save(directory, specialists(seed=1, data="other"))
    store.save(directory, specialists(seed=1, data="other"), overwrite=True)
    assert_same(store.load(directory), specialists(seed=1, data="other"))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_save_never_removes_what_it_did_not_write(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        UserError, match=r"holds thesis.tex, so a set of specialists is not written"
    ):
        store.save(tmp_path, specialists())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_save_refuses_what_does_not_fit(tmp_path):
    where = tmp_path / "store"

    def refuses(message, **changes):
        with pytest.raises(UserError, match=message):
            store.save(where, specialists(**changes))
        assert not list(tmp_path.iterdir())

    refuses("a net of 2 members for 1 class sets; expected 1", class_sets=SETS[:1])
    refuses("expected 2 specialists in every leaf", params={"a": np.zeros((3, 1))})
    refuses(r"class_sets \(2,\) with corrections \(2,\)", class_sets=SETS[:, 0])
    refuses(r"corrections \(1,\); expected \[K, S\] and \[K\]", corrections=np.zeros(1))
    refuses("class_sets name class 10; there are 9", class_sets=SETS + 1)
    refuses(r"a leaf at params\['a'\]\[0\]", params={"a": [np.zeros(2)]})
    refuses("one of unit, .*, not 'own'", head=heads.UNIT._replace(name="own"))
