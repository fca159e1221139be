"""Trained specialists on disk: they come back as they were, or not at all."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import models
from distill_jax.errors import UserError
from distill_jax.specialists import store

C = 9
SETS = np.array([[1, 4, 7], [0, 8, C]], np.int32)
META = {"generalist": "abc", "data": "def", "num_classes": C, "kind": "collapsed"}


def specialists(seed=0, **meta):
    model = models.mlp([5], 4)
    keys = jax.random.split(jax.random.key(seed), 2)
    params = jax.vmap(lambda key: model.init(key, jnp.zeros((1, 3))))(keys)
    return store.Specialists(params, SETS, np.array([2.5, 0.5], np.float32), {**META, **meta})


def assert_same(found, expected):
    assert found.meta == expected.meta
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not isinstance(y, (str, int)):
            assert isinstance(x, np.ndarray) and x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_specialists_come_back_as_they_were(tmp_path):
    store.save(tmp_path / "store", specialists())
    found = store.load(str(tmp_path / "store"), "abc", "def", C)
    assert_same(found, specialists())
    assert_same(store.load(tmp_path / "store"), specialists())
    apply = jax.vmap(models.mlp([5], 4).apply, (0, None))
    np.testing.assert_array_equal(
        apply(found.params, jnp.ones((2, 3))), apply(specialists().params, jnp.ones((2, 3)))
    )


def test_other_programs_need_only_numpy_and_json(tmp_path):
    store.save(tmp_path, specialists())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "class_sets.npy",
        "corrections.npy",
        "meta.json",
        "params.npz",
    ]
    params = np.load(tmp_path / "params.npz")
    assert set(params) == {"hidden_0/kernel", "hidden_0/bias", "output/kernel", "output/bias"}
    np.testing.assert_array_equal(
        params["hidden_0/kernel"], specialists().params["hidden_0"]["kernel"]
    )
    np.testing.assert_array_equal(np.load(tmp_path / "class_sets.npy"), SETS)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert META.items() <= meta.items()


def test_dtypes_that_numpy_has_not_come_back(tmp_path):
    leaves = {
        "bfloat16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7,
        "float8": jnp.arange(2, dtype=jnp.float8_e4m3fn),
        "float16": jnp.ones((2, 3), jnp.float16),
        "int8": np.array([[-1], [5]], np.int8),
        "strided": np.arange(8.0)[::4],
    }
    saved = specialists()._replace(params={"deep": {"er": leaves}, "flat": np.zeros(2)})
    store.save(tmp_path, saved)
    assert_same(store.load(tmp_path), saved)
    params = np.load(tmp_path / "params.npz")
    assert params["deep/er/bfloat16"].dtype == np.uint16


def test_load_refuses_what_is_not_expected(tmp_path):
    store.save(tmp_path, specialists())
    with pytest.raises(UserError, match=r"have generalist 'abc', not 'xyz'$"):
        store.load(tmp_path, generalist="xyz")
    with pytest.raises(UserError, match=r"have data 'def', not 'uvw'$"):
        store.load(tmp_path, data="uvw")
    with pytest.raises(UserError, match=r"have num_classes 9, not 10$"):
        store.load(tmp_path, num_classes=10)
    with pytest.raises(UserError, match=r"data 'def', not 'uvw'; num_classes 9, not 10"):
        store.load(tmp_path, "abc", "uvw", 10)


@pytest.mark.parametrize("name,value", [("version", 2), ("format", "distill_jax.soft_targets")])
def test_load_refuses_another_version_and_format(tmp_path, name, value):
    store.save(tmp_path, specialists())
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, name: value}))
    with pytest.raises(UserError, match=f"{value}.*; this program reads .* version 1"):
        store.load(tmp_path)


@pytest.mark.parametrize("name", [*store.FILES, "meta.json"])
def test_any_changed_byte_is_noticed(tmp_path, name):
    store.save(tmp_path, specialists())
    good = (tmp_path / name).read_bytes()
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        (tmp_path / name).write_bytes(damaged)
        try:
            found = store.load(tmp_path)
        except UserError as error:
            assert str(tmp_path) in str(error)
        else:  # one kind of blank between JSON's words for another
            assert name == "meta.json" and chr(good[place]).isspace()
            assert_same(found, specialists())


@pytest.mark.parametrize("name", [*store.FILES, "meta.json"])
def test_a_cut_or_missing_file_is_noticed(tmp_path, name):
    store.save(tmp_path, specialists())
    good = (tmp_path / name).read_bytes()
    for kept in (0, 20, len(good) // 2, len(good) - 1):
        (tmp_path / name).write_bytes(good[:kept])
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*(damaged|:)"):
            store.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        store.load(tmp_path)


def test_meta_that_is_no_table_is_noticed(tmp_path):
    (tmp_path / "meta.json").write_text("[1]")
    with pytest.raises(UserError, match="no readable specialists in"):
        store.load(tmp_path)


class Killed(BaseException):
    """Not an error that a program could handle."""


def killed_saves(monkeypatch, directory, saved):
    """Saves that end before each of their calls to write something, and what they leave behind."""
    steps = [(np, "savez"), (np, "save"), (store, "_sha256"), (json, "dumps"), (os, "replace")]
    for module, name in steps:

        def stop(*arguments, **options):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            with pytest.raises(Killed):
                store.save(directory, saved)
        yield name


def test_a_killed_save_never_leaves_a_readable_half(tmp_path, monkeypatch):
    directory = tmp_path / "store"
    for _ in killed_saves(monkeypatch, directory, specialists()):
        assert (tmp_path / "store.partial").exists()
        with pytest.raises(UserError, match=r"not written to the end: .*store\.partial; give"):
            store.load(directory)
    store.save(directory, specialists())
    assert_same(store.load(directory), specialists())
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_killed_save_leaves_earlier_specialists_whole_until_it_replaces_them(
    tmp_path, monkeypatch
):
    directory = tmp_path / "store"
    store.save(directory, specialists())
    for name in killed_saves(monkeypatch, directory, specialists(seed=1, kind="dustbin")):
        if name != "replace":
            assert_same(store.load(directory), specialists())
    with pytest.raises(UserError, match="not written to the end"):  # between removing and naming
        store.load(directory)
    store.save(directory, specialists(seed=1, kind="dustbin"))
    assert_same(store.load(directory), specialists(seed=1, kind="dustbin"))


def test_a_half_itself_can_not_be_opened(tmp_path):
    store.save(tmp_path / "store", specialists())
    shutil.move(tmp_path / "store", tmp_path / "store.partial")
    (tmp_path / "store.partial" / "meta.json").unlink()  # written last
    with pytest.raises(UserError, match="no readable specialists in"):
        store.load(tmp_path / "store.partial")


def test_save_refuses_what_does_not_fit(tmp_path):
    good, where = specialists(), tmp_path / "store"

    def refuses(message, **changes):
        with pytest.raises(UserError, match=message):
            store.save(where, good._replace(**changes))
        assert not list(tmp_path.iterdir())

    refuses(r"hidden_0/bias \(2, 5\) for 1 class sets; expected 1", class_sets=SETS[:1])
    refuses(r"class_sets \(2,\) with corrections \(2,\)", class_sets=SETS[:, 0])
    refuses(r"corrections \(1,\); expected \[K, S\] and \[K\]", corrections=good.corrections[:1])
    refuses("class_sets name class 10; there are 9", class_sets=SETS + 1)
    refuses(r"meta has \['kind'\]; expected \['data', 'generalist', ", meta={"kind": "dustbin"})
    refuses(r"a leaf at params\['a'\]\[0\]", params={"a": [np.zeros(2)]})
    refuses(r"a leaf at params\['a/b'\]", params={"a/b": np.zeros(2)})
    refuses(r"a leaf at params$", params=np.zeros(2))
