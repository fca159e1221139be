"""The data set of aligned utterances: written, read without TensorFlow, and broken in many ways."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command import ROOT
from tfds_sets import WITHOUT_TENSORFLOW

from distill_jax.errors import UserError
from experiments.common import prepared
from experiments.speech import speech_frames

SOUND = ROOT / "tests/experiments/speech/recordings/fotaq_180008p1.flac"
METADATA = {"byte": [128, 12], "phones": ["AA", "+NSN+"], "mel_deviation": [0.1, 4.0]}


def utterance(name, count, speaker="ann", audio=b""):
    random = np.random.default_rng(count)
    return speech_frames.Utterance(
        name,
        speaker,
        ("caf\u00e9", "don't"),
        random.integers(0, 256, (count, 40), np.uint8),
        random.integers(0, 5126, count).astype(np.int32),
        ("<sil>", "caf\u00e9", "don't(2)"),
        np.array([0, 3, 7], np.int32),
        audio,
    )


SETS = {
    "train": [utterance("a", 11), utterance("b", 300, ""), utterance("c", 10)],
    "validation": [utterance("d", 12)],
    "test": [utterance("e", 20, audio=SOUND.read_bytes()), utterance("f", 21, "bob")],
}


def write(directory, sets=SETS):
    makers = {name: lambda part=part: iter(part) for name, part in sets.items()}
    return speech_frames.write(directory, makers, METADATA)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("set"))


@pytest.fixture
def copy(written, tmp_path):
    """A set of the test's own, to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def assert_same(found, expected):
    for field, one, other in zip(expected._fields, found, expected, strict=True):
        if isinstance(other, np.ndarray):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), field
            np.testing.assert_array_equal(one, other)
        else:
            assert (type(one), one) == (type(other), other), field


def test_what_is_written_is_read(written):
    data_dir = written.parents[1]
    assert written == prepared.folder_of(speech_frames.KIND, data_dir)
    for source in (written, data_dir):
        corpus = speech_frames.load(str(source))
        assert corpus.metadata == METADATA and corpus.name == str(source)
        assert list(corpus.splits) == list(speech_frames.SPLITS)
        for name, expected in SETS.items():
            found = {one.id: one for one in corpus.splits[name]}
            assert len(corpus.splits[name]) == len(found) == len(expected)
            for one in expected:
                assert_same(found[one.id], one)


def test_some_splits(written):
    corpus = speech_frames.load(str(written), ("validation",))
    assert list(corpus.splits) == ["validation"]


def test_kept_audio_is_the_recording(written):
    kept = {one.id: one for one in speech_frames.load(str(written)).splits["test"]}["e"]
    samples = kept.samples()
    assert samples.dtype == np.int16
    np.testing.assert_array_equal(samples, soundfile.read(SOUND, dtype="int16")[0])


def test_the_order_is_the_same_each_time(written, tmp_path):
    reverse = {name: part[::-1] for name, part in SETS.items()}
    again = speech_frames.load(str(write(tmp_path, reverse)))
    first = speech_frames.load(str(written))
    assert [one.id for one in again.splits["train"]] == [one.id for one in first.splits["train"]]


def test_tensorflow_is_not_needed(written):
    code = f"""
from experiments.speech import speech_frames
corpus = speech_frames.load({str(written)!r})
print({{name: sum(len(one.frames) for one in part) for name, part in corpus.splits.items()}})
assert "tensorflow" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.strip() == "{'train': 321, 'validation': 12, 'test': 41}", result.stderr


def fails(source):
    with pytest.raises(UserError) as caught:
        speech_frames.load(str(source))
    return str(caught.value)


def test_no_set(tmp_path):
    for source in (tmp_path, tmp_path / "absent"):
        message = fails(source)
        assert str(source) in message and message.startswith("data.source: ")
        assert f"python -m experiments.speech.prepare --corpus=debian --out={source}" in message


@pytest.mark.parametrize(
    "left", ["speech_frames/incomplete.AB12_1.0.0/dataset_info.json", "work/set.json"]
)
def test_a_preparation_that_did_not_end(tmp_path, left):
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).write_text("{}")
    message = fails(tmp_path)
    assert str(tmp_path) in message and "run the same command again" in message


@pytest.mark.parametrize("name", ["metadata.json", "features.json", "dataset_info.json"])
@pytest.mark.parametrize("keep", [None, 0, 20])
def test_damaged_description(copy, name, keep):
    content = (copy / name).read_bytes()
    (copy / name).unlink() if keep is None else (copy / name).write_bytes(content[:keep])
    message = fails(copy)
    assert str(copy) in message and "\n" not in message


def damage(content, position):
    changed = bytearray(content)
    changed[position] ^= 0x55
    return bytes(changed)


def test_damaged_shard(copy):
    shard = next(copy.glob("*-train.*"))
    content = shard.read_bytes()
    # Random bytes can't be packed: the 300 frames of "b" take up most of the file before its padding.
    used = len(content.rstrip(b"\0"))
    broken = [content[:0], content[: len(content) // 2], content[:-1]]
    broken += [damage(content, position) for position in (200, 5000, 10000)]
    assert used > 10000
    for changed in broken:
        shard.write_bytes(changed)
        message = fails(copy)
        assert str(copy) in message and "split train" in message
        assert "prepare the set again" in message
    shard.unlink()
    assert "split train" in fails(copy)


def test_a_split_that_is_not_there(tmp_path):
    two = {name: part for name, part in SETS.items() if name != "validation"}
    folder = write(tmp_path, two)
    assert "validation" in fails(folder)
    assert list(speech_frames.load(str(folder), ("train",)).splits) == ["train"]


def test_the_fingerprint_is_that_of_ids_and_states():
    def of(part):
        corpus = speech_frames.Corpus("any", {"train": part, "test": []}, {})
        return speech_frames.alignment_fingerprint(corpus, "train")

    one, two, three = SETS["train"]
    states = two.states.copy()
    states[150] += 1
    changed = [
        [one, two._replace(states=states), three],
        [one, two._replace(states=two.states[:-1]), three],
        [one, two._replace(id="B"), three],
        [two, one, three],
        [one, two],
        # The same states in a row, of other utterances.
        [
            one._replace(states=np.append(one.states, two.states[0])),
            two._replace(states=two.states[1:]),
            three,
        ],
        [],
    ]
    digests = [of(part) for part in changed] + [of(SETS["train"])]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)
    assert of([one, two._replace(frames=two.frames // 2, speaker="x"), three]) == digests[-1]


def test_metadata_is_plain_json(written):
    assert json.loads((written / "metadata.json").read_text()) == METADATA
