"""Readers of speech corpora: audio, texts, manifests and LibriSpeech, on tiny corpora made here."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from command import ROOT
from recordings import audio_bytes, by_id

from distill_jax.errors import UserError
from experiments.speech.corpus import librispeech, manifest
from experiments.speech.corpus import recordings as corpus
from experiments.speech.corpus.text import words

SPEECH = Path(__file__).parent / "recordings"


def sine(rate, frequency=440.0, seconds=0.5):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(rate * seconds) / rate)).astype("f4")


class TestWords:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("`...requisition form SOS23.'", "requisition form sos twenty three"),
            ("It's goin' to BE the workers' \u2018day\u2019, isn\u2019t it?", None),
            (
                "The 13th, 1,844 times",
                "the thirteenth one thousand eight hundred and forty four times",
            ),
            ("Caf\u00e9 - twenty-one!", "cafe twenty one"),
            ("'Tis 'em 'quoted' ' ''", "tis 'em quoted"),
            ("12:05", "twelve five"),
            ("...", ""),
        ],
    )
    def test_normalisation(self, text, expected):
        expected = (
            expected if expected is not None else "it's goin' to be the workers' day isn't it"
        )
        assert words(text) == expected.replace("\u2018", "").split()

    def test_a_number_of_any_length(self):
        assert words("1" * 5000) == ["one"] * 5000


class TestAudio:
    @pytest.mark.parametrize("rate", [8000, 11025, 11840, 44100])
    def test_a_tone_keeps_its_pitch_and_length(self, rate):
        samples, notes = corpus.to_mono_16k(sine(rate), rate)
        assert notes == [f"resampled from {rate} Hz"]
        assert samples.dtype == np.int16
        assert len(samples) == pytest.approx(8000, abs=2)
        spectrum = np.abs(np.fft.rfft(samples, 16000))  # a bin per Hz
        assert np.argmax(spectrum) == pytest.approx(440, abs=1)
        assert np.abs(samples[1000:-1000]).max() == pytest.approx(16000, rel=0.01)

    def test_channels_are_averaged(self):
        left, right = sine(16000), sine(16000, 1000.0)
        samples, notes = corpus.to_mono_16k(np.stack([left, right], axis=1), 16000)
        assert notes == ["stereo mixed to mono"]
        np.testing.assert_allclose(samples, (left + right) / 2 * 32000, atol=1.1)
        one, notes = corpus.to_mono_16k(left[:, None], 16000)
        assert (notes, one.shape) == ([], left.shape)
        assert corpus.to_mono_16k(np.zeros((9, 6), "f4"), 16000)[1] == ["6 channels mixed to mono"]

    def test_loud_audio_is_clipped_and_broken_audio_left_out(self):
        samples, _ = corpus.to_mono_16k(np.array([1, -1, 2, -2], "f4"), 16000)
        assert samples.tolist() == [32000, -32000, 32767, -32768]
        for broken in (np.nan, np.inf):
            samples, notes = corpus.to_mono_16k(np.array([0, broken], "f4"), 8000)
            assert (samples.shape, samples.dtype, notes) == ((0,), np.int16, [corpus.NOT_FINITE])
        assert corpus.to_mono_16k(np.zeros(0, "f4"), 8000)[1] == [corpus.NO_SAMPLES]

    @pytest.mark.parametrize("keep", [0, 100, 3000])
    def test_a_damaged_file_is_named(self, tmp_path, keep):
        path = tmp_path / "damaged.flac"
        noise = np.random.default_rng(0).uniform(-1, 1, 16000)
        path.write_bytes(audio_bytes(noise, 16000)[:keep])
        with pytest.raises(UserError, match=re.escape(str(path))):
            corpus.read_file(path)


class TestManifest:
    def test_recorded_utterances(self):
        found = by_id(manifest.recordings(SPEECH / "manifest.jsonl"))
        assert len(found) == 16
        lamb = found["bass08196"]
        assert (lamb.speaker, lamb.scene, lamb.split) == ("bass2", "", "")
        assert words(lamb.text) == ["i'm", "gilbert", "lamb", "the", "supervisor"]
        samples, rate = lamb.read()
        assert (samples.dtype, samples.ndim, rate) == (np.float32, 1, 16000)
        assert 0.05 < np.abs(samples).max() <= 1

    def test_all_keys_and_defaults(self, tmp_path):
        (tmp_path / "a.wav").write_bytes(audio_bytes(sine(8000), 8000, "WAV"))
        first = {"audio": "a.wav", "text": "one", "speaker": "s", "scene": "c", "split": "test"}
        second = {"audio": "a.wav", "text": "two", "id": "b", "more": 1}
        path = tmp_path / "m.jsonl"
        path.write_text(f"{json.dumps(first)}\n\n{json.dumps(second)}\n")
        one, two = manifest.recordings(path)
        assert one[:5] == ("a", "s", "c", "test", "one")
        assert two[:5] == ("b", "", "", "", "two")
        assert one.read()[1] == 8000

    def test_equal_file_names_in_several_folders(self, tmp_path):
        names = ["x/1.wav", "y/1.wav", "y/2.wav", "z/3.wav"]
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        entries = [{"audio": name, "text": "one"} for name in names]
        entries[-1]["id"] = "4"
        path = tmp_path / "m.jsonl"
        path.write_text("\n".join(map(json.dumps, entries)))
        found = manifest.recordings(path)
        assert [one.id for one in found] == ["x/1.wav", "y/1.wav", "2", "4"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 3: not JSON"),
            ("[1]", "line 3: expected a JSON object, found list"),
            ('{"audio": "a.wav"}', "line 3: text missing"),
            ("{}", "line 3: audio and text missing"),
            ('{"audio": "a.wav", "text": 3}', "line 3: text must be a string, found 3"),
            ('{"audio": "no.wav", "text": ""}', r"line 3: no audio file .*no\.wav"),
            ('{"audio": "a.wav", "text": "", "split": "dev"}', "line 3: split 'dev' is none of"),
            ('{"audio": "a.wav", "text": ""}', "line 3: id 'a.wav' is also that of line 1"),
        ],
    )
    def test_mistakes_are_named_by_file_and_line(self, tmp_path, line, message):
        (tmp_path / "a.wav").write_bytes(b"")
        path = tmp_path / "m.jsonl"
        path.write_text(f'{{"audio": "a.wav", "text": "one"}}\n\n{line}\n')
        with pytest.raises(UserError, match=f"{re.escape(str(path))}, {message}"):
            manifest.recordings(path)

    def test_no_manifest_and_an_empty_one(self, tmp_path):
        with pytest.raises(UserError, match=r"no readable manifest .*none\.jsonl"):
            manifest.recordings(tmp_path / "none.jsonl")
        (tmp_path / "m.jsonl").write_text("\n")
        with pytest.raises(UserError, match="no recordings"):
            manifest.recordings(tmp_path / "m.jsonl")


class TestLibrispeechFolders:
    def make(self, folder, part, name="19-198-0001"):
        chapter = folder / part / "19" / "198"
        chapter.mkdir(parents=True)
        (chapter / "19-198.trans.txt").write_text(f"{name} NORTHANGER ABBEY\n")
        (chapter / f"{name}.flac").write_bytes(audio_bytes(sine(16000), 16000))
        return chapter

    def test_layout_and_splits(self, tmp_path):
        for number, part in enumerate(("train-clean-100", "dev-other", "test-clean")):
            self.make(tmp_path, part, f"19-198-000{number}")
        found = by_id(librispeech.recordings(tmp_path))
        assert found["19-198-0000"][:5] == (
            *("19-198-0000", "19", "19-198", "train"),
            "NORTHANGER ABBEY",
        )
        assert [found[f"19-198-000{i}"].split for i in (1, 2)] == ["validation", "test"]
        samples, rate = found["19-198-0002"].read()
        np.testing.assert_allclose(samples, sine(16000), atol=1e-4)
        assert rate == 16000

    def test_mistakes(self, tmp_path):
        with pytest.raises(UserError, match="no transcripts"):
            librispeech.recordings(tmp_path)
        (self.make(tmp_path / "a", "dev-clean") / "19-198-0001.flac").unlink()
        with pytest.raises(UserError, match=r"line 1: no audio file .*19-198-0001\.flac"):
            librispeech.recordings(tmp_path / "a")
        self.make(tmp_path / "b", "music")
        with pytest.raises(UserError, match=r"/music: a part .* train-\*, dev-\*, test-\*"):
            librispeech.recordings(tmp_path / "b")


FEATURES = ("speech", "text", "speaker_id", "chapter_id", "id")


def prepare_tfds(data_dir, splits, without=()):
    features = {
        # On disk as TFDS's Audio, which can't be made without TensorFlow.
        "speech": tfds.features.Tensor(shape=(None,), dtype=np.int64),
        "text": tfds.features.Text(),
        "speaker_id": np.int64,
        "chapter_id": np.int64,
        "id": np.str_,
    }
    features = {name: kind for name, kind in features.items() if name not in without}
    with tfds.core.registered.skip_registration():

        class TinySpeech(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                kinds = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=kinds)

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(name) for name in splits}

            def _generate_examples(self, split):
                for key in range(3):
                    speech = np.array([key, 16384, -32768], np.int64)
                    values = (speech, f"TEXT {key}", 7, key, f"{split}-{key}")
                    named = dict(zip(FEATURES, values, strict=True))
                    yield key, {name: named[name] for name in features}

    TinySpeech(data_dir=data_dir).download_and_prepare(file_format="array_record")


class TestLibrispeechTfds:
    def test_round_trip(self, tmp_path):
        splits = {"train_clean100": "train", "dev_other": "validation", "test_clean": "test"}
        prepare_tfds(tmp_path, splits)
        found = by_id(librispeech.tfds_recordings("tiny_speech", str(tmp_path)))
        assert len(found) == 9
        for part, split in splits.items():
            for key in range(3):
                recording = found[f"{part}-{key}"]
                assert recording[1:5] == ("7", f"7-{key}", split, f"TEXT {key}")
                samples, rate = recording.read()
                assert (samples.dtype, rate) == (np.float32, 16000)
                assert samples.tolist() == [key / 32768, 0.5, -1]

    def test_another_process_reads_and_needs_no_tensorflow(self, tmp_path):
        prepare_tfds(tmp_path, ["test_clean"])
        found = librispeech.tfds_recordings("tiny_speech", str(tmp_path))
        (tmp_path / "read").write_bytes(pickle.dumps(found[0].read))
        code = (
            "import pickle, sys; read = pickle.load(open(sys.argv[1], 'rb'))\n"
            "print(len(read()[0]), 'tensorflow' in sys.modules)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "read")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.stdout == "3 False\n", result.stderr

    def test_mistakes(self, tmp_path):
        with pytest.raises(UserError, match="tfds build librispeech"):
            librispeech.tfds_recordings("librispeech", str(tmp_path))
        prepare_tfds(tmp_path / "a", ["noise"])
        with pytest.raises(UserError, match=r"split noise: a part .* train_\*"):
            librispeech.tfds_recordings("tiny_speech", str(tmp_path / "a"))
        prepare_tfds(tmp_path / "b", ["test_clean"], without=["id"])
        with pytest.raises(UserError, match=r"test_clean, example 0: not the features .*, no id"):
            librispeech.tfds_recordings("tiny_speech", str(tmp_path / "b"))
        prepare_tfds(tmp_path / "c", ["test_clean"])
        folder = tmp_path / "c" / "tiny_speech" / "1.0.0"
        (records,) = folder.glob("*array_record*")
        content = records.read_bytes()
        records.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=f"{folder}, split test_clean.* cannot be read"):
            librispeech.tfds_recordings("tiny_speech:1.0.0", str(tmp_path / "c"))
        records.unlink()
        with pytest.raises(UserError, match=f"{folder}: 0 of 1 files of split test_clean"):
            librispeech.tfds_recordings("tiny_speech", str(tmp_path / "c"))
        info = folder / "dataset_info.json"
        info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
        with pytest.raises(UserError, match=f"tfrecord, which .*data_dir={tmp_path / 'c'} --file"):
            librispeech.tfds_recordings("tiny_speech", str(tmp_path / "c"))
        (folder.parent / "1.0.1").mkdir()
        (folder.parent / "1.0.1" / "dataset_info.json").write_text("{}")
        with pytest.raises(UserError, match=r"any of tiny_speech/1\.0\.0, tiny_speech/1\.0\.1 in"):
            librispeech.tfds_recordings("tiny_speech", str(tmp_path / "c"))
