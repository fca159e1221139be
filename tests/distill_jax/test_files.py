"""Files that appear whole or not at all, and say what they are."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from distill_jax import files
from distill_jax.errors import UserError

FORMAT = ("distill_jax.something", 3)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end_and_stays_if_the_writer_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.write_whole(path) as partial:
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with files.write_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole_and_never_replaces_one_with_files(tmp_path):
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with files.write_whole(path) as partial:
            partial.mkdir()
            (partial / "a").write_text(content)
    assert (path / "a").read_text() == "first" and names(tmp_path) == ["folder"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_is_replaced_where_asked(in_one_step, tmp_path, monkeypatch):
    if not in_one_step:  # as on a network file system
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with files.write_whole(path, replace=True) as partial:
            partial.mkdir()
            (partial / content).touch()
        assert names(path) == [content] and names(tmp_path) == ["folder"]
    with pytest.raises(ZeroDivisionError), files.write_whole(path, replace=True) as partial:
        partial.mkdir()
        1 / 0  # noqa: B018
    assert names(path) == ["second"] and names(tmp_path) == ["folder"]


def test_what_names_the_content_of_a_folder(tmp_path):
    (tmp_path / "a").write_bytes(bytes(300_000))
    (tmp_path / "within").mkdir()
    before = files.content_of(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "within" / "b").touch()
    assert files.content_of(tmp_path) == before
    (tmp_path / "a").write_bytes(bytes(299_999) + b"1")
    assert files.content_of(tmp_path) != before


def test_an_error_of_the_disk_is_not_hidden(tmp_path):
    with pytest.raises(FileNotFoundError), files.write_whole(tmp_path / "none" / "a") as partial:
        partial.write_text("x")
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), files.write_whole(tmp_path / "a"):
        (tmp_path / "none").read_text()  # an error of the block, although the file is there


def test_a_folder_with_other_files_is_refused(tmp_path):
    files.check_own_folder(tmp_path / "none", [], "a store")
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "meta.json.0a1b2c3d.partial").mkdir()
    files.check_own_folder(tmp_path, ["meta.json"], "a store")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis.tex, so a store is not written there"):
        files.check_own_folder(tmp_path, ["meta.json"], "a store")
    with pytest.raises(UserError, match=r"thesis\.tex is a file"):
        files.check_own_folder(tmp_path / "thesis.tex", [], "a store")


def test_json_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": [1, None]})
    assert files.read_json(path) == {"a": [1, None]}
    path.write_text("{")
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        files.read_json(path)
    with pytest.raises(UserError, match=r"b\.json can't be read: No such file"):
        files.read_json(tmp_path / "b.json")


def test_versions_are_checked(tmp_path):
    path = tmp_path / "meta.json"
    files.write_json(path, files.versioned(FORMAT, {"k": 2}))
    assert files.read_versioned(path, FORMAT, "again")["k"] == 2
    with pytest.raises(
        UserError,
        match=r"has format distill_jax.something version 3; this program reads distill_jax.something "
        r"version 4: make it again",
    ):
        files.read_versioned(path, (FORMAT[0], 4), "make it again")
    path.write_text(json.dumps([1]))
    with pytest.raises(UserError, match="format None version None"):
        files.read_versioned(path, FORMAT, "again")
    os.remove(path)
    with pytest.raises(UserError, match=r"can't be read: No such file or directory; make it again"):
        files.read_versioned(path, FORMAT, "make it again")


def test_hashes_of_files_and_folders(tmp_path):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.arange(3))
    before = files.sha256(tmp_path)
    files.check_sha256(tmp_path, before, "again")
    data = bytearray((tmp_path / "b.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b.npy").write_bytes(data)
    assert files.sha256(tmp_path) != before
    with pytest.raises(UserError, match=r"is damaged: its SHA-256 is not .*; write it again"):
        files.check_sha256(tmp_path, before, "write it again")
    with pytest.raises(UserError, match="c is damaged"):
        files.check_sha256(tmp_path / "c", before, "again")


def test_differences_are_named_with_both_sides():
    files.check_same("x", {"a": 1, "b": 2}, {"a": 1})
    with pytest.raises(UserError) as error:
        files.check_same("x is another's", {"a": 1, "b": 2}, {"a": 3, "c": "d"}, "Take another")
    assert str(error.value) == (
        "x is another's: a is 1 there and 3 now, c is None there and 'd' now. Take another"
    )


def test_a_sealed_file_notices_any_change(tmp_path):
    path = tmp_path / "meta.json"
    files.write_sealed(path, FORMAT, {"k": 2, "nested": {"a": [1.5]}})
    assert files.read_sealed(path, FORMAT, "again") == files.versioned(
        FORMAT, {"k": 2, "nested": {"a": [1.5]}}
    )
    path.write_text(path.read_text().replace("1.5", "1.25"))
    with pytest.raises(UserError, match=r"meta\.json is damaged: its SHA-256 is not the one"):
        files.read_sealed(path, FORMAT, "again")


def test_a_local_path_is_a_path_with_the_home_folder_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.local_path("~/runs") == Path("/home/me/runs")
    assert files.local_path(Path("a:b/c, d")) == Path("a:b/c, d")


@pytest.mark.parametrize("scheme", ["gs", "s3", "file", "hdfs", "https"])
def test_an_address_is_no_local_path(scheme):
    for path in (f"{scheme}://a/b", Path(f"{scheme}://a/b")):
        with pytest.raises(UserError, match=f"^{scheme}:/.* is not on a local file system; mount"):
            files.local_path(path)


@pytest.mark.parametrize("path", ["", "a\0b", "~no_such_user/runs"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(UserError):
        files.local_path(path)
