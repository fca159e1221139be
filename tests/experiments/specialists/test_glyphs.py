"""The data set of glyphs: written, read without TensorFlow, and broken in many ways."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import ROOT
from tfds_sets import WITHOUT_TENSORFLOW

from distill_jax.errors import UserError
from experiments.common import prepared
from experiments.specialists import glyphs
from experiments.specialists.corpus import characters

CHARACTERS = ("\u4e9c", "\u5516", "\u5a03")
TYPEFACES = [
    {"name": f"fonts-x/{letter}.ttf", "package": "fonts-x", "group": group, "split": split}
    for letter, group, split in [
        ("a", 0, "train"),
        ("b", 1, "validation"),
        ("c", 0, "train"),
        ("d", 2, "test"),
    ]
]
LABELS = {  # by split and typeface
    "train": {0: [0, 2], 2: [0, 1]},
    "seen": {0: [1], 2: [2]},
    "validation": {1: [0, 1, 2]},
    "test": {3: [2]},
}


def image(typeface, label):
    return np.random.default_rng([typeface, label]).integers(0, 256, (32, 32), np.uint8)


def sheets(split):
    return [
        glyphs.Sheet(face, np.array(labels), np.stack([image(face, label) for label in labels]))
        for face, labels in LABELS[split].items()
    ]


def write(directory, faces=TYPEFACES, order=1):
    splits = {name: sheets(name)[::order] for name in LABELS}
    return glyphs.write(directory, CHARACTERS, faces, splits, {"made": "here"})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def embedded():
    return glyphs.load()


@pytest.fixture
def copy(written, tmp_path):
    """A set of the test's own, to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def fails(source):
    with pytest.raises(UserError) as caught:
        glyphs.load(source)
    return str(caught.value)


def test_what_is_written_is_read(written):
    data_dir = written.parents[1]
    assert written == prepared.folder_of(glyphs.KIND, data_dir)
    for source in (written, data_dir, str(data_dir)):
        read = glyphs.load(source)
        assert read.characters == CHARACTERS and read.typefaces == tuple(TYPEFACES)
        assert read.metadata["made"] == "here"
        assert list(read.splits) == list(glyphs.SPLITS)
        for name, labels in LABELS.items():
            part = read.splits[name]
            cells = [(face, label) for face in sorted(labels) for label in labels[face]]
            assert list(zip(part["typeface"], part["label"], strict=True)) == cells
            assert part["id"].tolist() == [face * 3 + label for face, label in cells]
            np.testing.assert_array_equal(part["inputs"], [image(*cell) for cell in cells])
            assert part["inputs"].dtype == np.uint8
            assert {part[field].dtype for field in ("id", "label", "typeface")} == {
                np.dtype("int32")
            }


def test_the_order_of_writing_does_not_matter(written, tmp_path):
    again, first = glyphs.load(write(tmp_path, order=-1)), glyphs.load(written)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.splits["train"]["id"], first.splits["train"]["id"])


def test_the_fingerprint_is_of_pixels_and_typefaces(written, tmp_path, monkeypatch):
    first = glyphs.load(written).fingerprint
    assert len(first) == 16 and int(first, 16)
    other = [{**face, "version": "2"} for face in TYPEFACES]
    assert glyphs.load(write(tmp_path / "version", other)).fingerprint != first
    monkeypatch.setitem(globals(), "image", lambda *cell: np.full((32, 32), sum(cell), np.uint8))
    assert glyphs.load(write(tmp_path / "pixels")).fingerprint != first


def python(code, folder):
    """What a program prints that can't import tensorflow."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW + code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_stock_tfds_reads_it(written):
    """As anyone with TFDS would, who has none of this project's code."""
    code = f"""
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(written)!r})
features = builder.info.features
for split in ("train", "seen", "validation", "test"):
    for record in builder.as_data_source(split):
        name = features["typeface"].int2str(int(record["typeface"]))
        names = "".join(features["labels"].feature.int2str(int(x)) for x in record["labels"])
        print(split, name, ascii(names), int(record["images"].sum()))
"""
    expected = {
        f"{split} {TYPEFACES[face]['name']} {''.join(CHARACTERS[x] for x in labels)!a} "
        f"{sum(int(image(face, label).sum()) for label in labels)}"
        for split, faces in LABELS.items()
        for face, labels in faces.items()
    }
    assert set(python(code, "/").splitlines()) == expected


def test_tensorflow_is_not_needed(written):
    code = f"""
from experiments.specialists import glyphs
print(glyphs.load({str(written)!r}).fingerprint)
"""
    assert python(code, ROOT).strip() == glyphs.load(written).fingerprint


def test_no_set(tmp_path):
    for source in (tmp_path, tmp_path / "absent"):
        message = fails(source)
        assert message.startswith(f"data.source: no prepared glyphs set in {source}; prepare one")
        assert f"python -m experiments.specialists.prepare --out={source}" in message


@pytest.mark.parametrize("left", ["glyphs/incomplete.AB12_1.0.0/features.json", "work/set.json"])
def test_a_half_prepared_set(tmp_path, left):
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).write_text("{}")
    assert "run the same command again" in fails(tmp_path)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "metadata.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_damaged_descriptions(copy, file, content):
    if content is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(content)
    message = fails(copy)
    assert str(copy) in message and "\n" not in message


def test_another_format(copy):
    metadata = json.loads((copy / "metadata.json").read_text())
    (copy / "metadata.json").write_text(json.dumps({**metadata, "format": 2}))
    assert "the set of glyphs can't be read (it has format 2; this program reads 1)" in fails(copy)


def test_a_set_of_another_kind():
    message = fails(ROOT / "experiments/speech/embedded")
    assert "the set of glyphs can't be read (it is a set of speech_frames)" in message


@pytest.mark.parametrize("damage", ["cut", "zeros", "a byte", "empty", "gone"])
def test_damaged_records(copy, damage):
    (path,) = copy.glob("glyphs-train.array_record*")
    content = path.read_bytes()
    # Random pixels can't be compressed, so a row of them is found in the file.
    place = content.index(image(0, 0)[20].tobytes())
    damaged = {
        "cut": content[:place],
        "zeros": bytes(len(content)),
        "a byte": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        "empty": b"",
    }
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    assert str(copy) in fails(copy)


def test_embedded_counts(embedded):
    assert embedded.characters == characters.first(1000)
    assert len(embedded.typefaces) == 55
    sizes = {name: len(part["id"]) for name, part in embedded.splits.items()}
    assert sizes == {"train": 34070, "seen": 3888, "validation": 5964, "test": 10818}
    assert embedded.fingerprint == "037b4d2373729e43"


def test_embedded_splits_share_no_group(embedded):
    groups = {name: set() for name in glyphs.SPLITS}
    for name, part in embedded.splits.items():
        for number in np.unique(part["typeface"]):
            face = embedded.typefaces[number]
            assert face["split"] == ("train" if name == "seen" else name)
            groups[name].add(face["group"])
    assert groups["seen"] <= groups["train"]
    assert not groups["train"] & groups["validation"]
    assert not (groups["train"] | groups["validation"]) & groups["test"]
    assert {name: len(found) for name, found in groups.items()} == {
        "train": 21,
        "seen": 21,
        "validation": 3,
        "test": 7,
    }


def test_embedded_examples_are_all_different(embedded):
    ids = np.concatenate([part["id"] for part in embedded.splits.values()])
    assert len(np.unique(ids)) == len(ids)
    images = {
        hashlib.sha256(one.tobytes()).digest()
        for part in embedded.splits.values()
        for one in part["inputs"]
    }
    assert len(images) == len(ids)
    for part in embedded.splits.values():
        np.testing.assert_array_equal(part["id"], part["typeface"] * 1000 + part["label"])
        assert (np.diff(part["id"]) > 0).all()
        assert not (part["inputs"] % 17).any()  # 16 grey levels


def test_embedded_splits_have_every_character(embedded):
    """A specialist of any character has something to learn from and to be judged by."""
    for name, least in {"train": 25, "validation": 3, "test": 6}.items():
        assert np.bincount(embedded.splits[name]["label"], minlength=1000).min() >= least


def test_every_embedded_package_has_its_notice():
    notices = glyphs.KIND.embedded / "licences"
    for face in glyphs.load().typefaces:
        assert "opyright" in (notices / face["package"] / "copyright").read_text()
    size = sum(path.stat().st_size for path in glyphs.KIND.embedded.rglob("*") if path.is_file())
    assert size < 19_500_000


def test_characters():
    level_1, shared = characters.level_1(), characters.common()
    assert (len(level_1), len(set(level_1)), len(shared)) == (2965, 2965, 1759)
    assert level_1[0] == "\u4e9c" and level_1[-1] == "\u8155"  # rows 16 to 47 of the standard
    assert shared[0] == "\u5a03" and set(shared) < set(level_1)
    assert "\u56fd" not in shared and "\u56fd" in level_1  # Taiwan writes \u570b
    assert characters.first(1759) == shared and characters.first(1760) == level_1[:1760]
    for number in (0, 1, 2966):
        with pytest.raises(UserError, match=f"--characters={number}: expected 2 to 2965"):
            characters.first(number)
