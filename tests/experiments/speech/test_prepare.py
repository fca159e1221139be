"""Preparing a corpus: bad recordings are counted, a killed run resumes, limits are kept."""

import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from command import ROOT, fails, run, start

from distill_jax.errors import UserError
from experiments.common import prepared
from experiments.speech import prepare as prepare_command
from experiments.speech import speech_frames
from experiments.speech.corpus import features, manifest, pipeline
from experiments.speech.corpus.recordings import Recording, to_mono_16k

SPEECH = Path(__file__).parent / "recordings"
MODULE = "experiments.speech.prepare"
SPLITS = {"bass2": "train", "fotaq_JOE": "train", "fotaq_FAYE": "validation", "bass3": "test"}
AUDIO_WORDS = 14
LIMITS = dict.fromkeys(speech_frames.SPLITS, 0)


def write_manifest(folder):
    """The recorded utterances and nine others; no part of 16 has both train and other audio."""
    folder.mkdir()
    rows = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        shutil.copyfile(SPEECH / row["audio"], folder / row["audio"])
        row.update(audio=str(folder / row["audio"]), split=SPLITS[row["speaker"]])
    train = [row for row in rows if row["split"] == "train"]
    others = [row for row in rows if row["split"] != "train"]
    entries = train + _bad_rows(folder, train[0]) + others
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in entries))
    return path


def _bad_rows(folder, good):
    """A stereo recording in another rate, which can be used, and eight that can't."""
    samples, rate = soundfile.read(good["audio"])
    stereo = soxr.resample(np.stack([samples, samples / 2], axis=1), rate, 44100)
    soundfile.write(folder / "stereo.wav", stereo, 44100)
    soundfile.write(folder / "empty.wav", samples[:0], rate)
    soundfile.write(folder / "short.wav", samples[:800], rate)
    soundfile.write(folder / "crowded.wav", samples[:16000], rate)
    (folder / "damaged.flac").write_bytes(Path(good["audio"]).read_bytes()[:20000])
    (folder / "nothing.wav").write_bytes(b"")
    texts = {
        "stereo.wav": good["text"],
        "empty.wav": "hello",
        "short.wav": "hello",
        "crowded.wav": good["text"] * 9,
        "damaged.flac": good["text"],
        "nothing.wav": "hello",
    }
    made = [
        {"audio": str(folder / name), "text": text, "split": "train", "speaker": "made"}
        for name, text in texts.items()
    ]
    return [
        *made,
        {**good, "id": "copy"},
        {**good, "id": "unknown", "text": "Hello, Xqzt!"},
        {**good, "id": "wordless", "text": "..."},
    ]


REASONS = {
    "aligned": 17,
    "empty or too short audio": 2,
    "unreadable audio": 2,
    "the words don't fit the audio": 1,
    "the same audio as another recording": 1,
    "words that the dictionary lacks": 1,
    "no words in the transcript": 1,
}
LEFT_OUT = {
    "empty": "empty or too short audio",
    "short": "empty or too short audio",
    "crowded": "the words don't fit the audio",
    "copy": "the same audio as another recording: bass08196",
    "unknown": "words that the dictionary lacks: xqzt",
    "wordless": "no words in the transcript",
}


def arguments(path, out, processes):
    return (
        f"--corpus=manifest:{path}",
        f"--out={out}",
        f"--processes={processes}",
        f"--audio_words={AUDIO_WORDS}",
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The manifest, the folder, what was printed and the set of a whole run of the command."""
    folder = tmp_path_factory.mktemp("prepare")
    path = write_manifest(folder / "corpus")
    output = run(*arguments(path, folder / "out", 2), module=MODULE)
    return path, folder / "out", output, speech_frames.load(str(folder / "out"))


@functools.cache
def analysed(name):
    """A recorded utterance, analysed once for all tests; pickled, as a worker hands it over."""
    found = {one.id: one for one in manifest.recordings(SPEECH / "manifest.jsonl")}
    return pickle.loads(pickle.dumps(pipeline.analyse(found[name], features.Bands())))


def test_every_recording_is_accounted_for(undisturbed):
    path, out, output, corpus = undisturbed
    report = json.loads((out / "report.json").read_text())
    left_out = report["left_out"]
    assert report["recordings"] == corpus.metadata["recordings"] == REASONS
    for name in ("damaged", "nothing"):
        assert left_out.pop(name).startswith(f"unreadable audio: {path.parent / name}")
    assert left_out == LEFT_OUT
    notes = {"stereo mixed to mono": 1, "resampled from 44100 Hz": 1, "no samples": 1}
    assert report["notes"] == notes
    counts = {**REASONS, **notes}.items()
    assert all(f"{count} of 25 recordings: {reason}\n" in output for reason, count in counts)
    taken = {one.id for part in corpus.splits.values() for one in part}
    ids = {one.id for one in manifest.recordings(path)}
    assert taken | left_out.keys() | {"damaged", "nothing"} == ids and len(ids) == 25


def test_the_command_says_what_it_made(undisturbed):
    _, out, output, corpus = undisturbed
    for name, part in corpus.splits.items():
        count = sum(len(one.states) for one in part)
        assert f"{name}: {len(part)} utterances, {count} frames\n" in output
    assert output.endswith(f"prepared {prepared.folder_of(speech_frames.KIND, out)}\n")
    assert "aligned 2/2 parts, 0:00 to go" in output
    assert not (out / "work").exists()


def test_the_set_is_the_alignment_and_the_features(undisturbed):
    path, _, _, corpus = undisturbed
    speakers = {one.id: one.speaker for one in manifest.recordings(path)}
    deviation = np.array(corpus.metadata["mel_deviation"])
    assert [len(corpus.splits[name]) for name in speech_frames.SPLITS] == [9, 4, 4]
    for split, part in corpus.splits.items():
        for one in part:
            assert one.speaker == speakers[one.id]
            if one.id == "stereo":
                continue
            expected = analysed(one.id)
            assert SPLITS[one.speaker] == split and one.words == expected.words
            frames = features.quantise(expected.log_mels, deviation)
            np.testing.assert_array_equal(one.frames, frames)
            np.testing.assert_array_equal(one.states, expected.aligned.states)
            np.testing.assert_array_equal(one.starts, expected.aligned.starts)
            assert one.segments == expected.aligned.segments


def test_training_frames_have_unit_deviation(undisturbed):
    parts = undisturbed[3].splits["train"]
    zero, steps = undisturbed[3].metadata["byte"]
    values = [(one.frames.astype(np.float64) - zero) / steps for one in parts]
    centred = np.concatenate([one - one.mean(axis=0) for one in values])
    np.testing.assert_allclose(centred.std(axis=0), 1, atol=0.01)
    assert max(np.abs(one.mean(axis=0)).max() for one in values) < 0.01


def test_a_stereo_recording_is_like_its_mono_one(undisturbed):
    found = {one.id: one for one in undisturbed[3].splits["train"]}
    one, other = found["stereo"].states, found["bass08196"].states
    count = min(len(one), len(other))
    assert abs(len(one) - len(other)) <= 1
    assert (one[:count] == other[:count]).mean() > 0.8


def test_metadata(undisturbed):
    path, _, _, corpus = undisturbed
    metadata = corpus.metadata
    assert metadata["corpus"] == f"manifest:{path}"
    assert metadata["bands_hz"] == [64.0, 7600.0]
    assert metadata["byte"] == [features.ZERO, features.STEPS]
    assert metadata["speakers_of_train"] == 3
    assert metadata["aligner"].startswith("pocketsphinx 5")
    assert len(metadata["phones"]) == len(metadata["phone_states"]) == 5126
    assert metadata["transcripts"] == []


def by_hash(ids):
    return sorted(ids, key=lambda name: hashlib.md5(name.encode()).hexdigest())


def test_audio_is_kept_up_to_a_number_of_words(undisturbed):
    corpus = undisturbed[3]
    recordings = {one.id: one for one in manifest.recordings(undisturbed[0])}
    assert not any(one.audio for name in ("train", "validation") for one in corpus.splits[name])
    part = {one.id: one for one in corpus.splits["test"]}
    kept = {name for name, one in part.items() if one.audio}
    order = by_hash(part)
    assert kept == set(order[: len(kept)]) and 0 < len(kept) < len(part)
    words = [len(part[name].words) for name in order]
    assert sum(words[: len(kept)]) <= AUDIO_WORDS < sum(words[: len(kept) + 1])
    for name in kept:
        samples, _ = to_mono_16k(*recordings[name].read())
        np.testing.assert_array_equal(part[name].samples(), samples)


def wait_for(process, sighted):
    deadline = time.monotonic() + 120
    while not sighted():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)


def kill_when(options, sighted):
    """Starts the command and kills it with -9 as soon as `sighted()`."""
    process = start(*options, module=MODULE)
    wait_for(process, sighted)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_same_set(found, expected):
    for name in expected.metadata.keys() - {"corpus"}:  # the manifest's path
        assert found.metadata[name] == expected.metadata[name], name
    for split, part in expected.splits.items():
        for one, other in zip(found.splits[split], part, strict=True):
            for field, value, wanted in zip(one._fields, one, other, strict=True):
                np.testing.assert_array_equal(value, wanted, f"{one.id}, {field}")


def test_a_killed_run_goes_on(tmp_path, undisturbed):
    path, out = write_manifest(tmp_path / "corpus"), tmp_path / "out"
    options = arguments(path, out, 1)
    kill_when(options, (out / "work/part_00000.pickle").exists)
    # A part that is done is not read again.
    for one in path.read_text().splitlines()[:16]:
        Path(json.loads(one)["audio"]).write_bytes(b"no audio")

    kill_when(options, lambda: any(out.glob("speech_frames/incomplete*")))
    assert any(out.glob("speech_frames/incomplete*"))
    with pytest.raises(UserError, match="run the same command again"):
        speech_frames.load(str(out))

    output = run(*options, module=MODULE)
    assert "2 of 2 parts were aligned before" in output
    assert_same_set(speech_frames.load(str(out)), undisturbed[3])
    assert sorted(file.name for file in (out / "speech_frames").iterdir()) == ["1.0.0"]
    assert not (out / "work").exists()


def test_an_interrupted_run_says_that_it_resumes(tmp_path, undisturbed):
    command = [sys.executable, "-m", MODULE, *arguments(undisturbed[0], tmp_path, 1)]
    errors = subprocess.PIPE
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stderr=errors,
        start_new_session=True,
        # Children of a shell's background job inherit that SIGINT is ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(process, (tmp_path / "work/part_00000.pickle").exists)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to its workers too
    _, printed = process.communicate()
    assert process.returncode == 1 and printed == "\nstopped; the same command resumes\n"


def test_nothing_usable(tmp_path):
    soundfile.write(tmp_path / "short.wav", np.zeros(800), 16000)
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"audio": "short.wav", "text": "hello"}))
    message = fails(*arguments(path, tmp_path / "out", 1), module=MODULE)
    assert f"manifest:{path}: none of 1 recordings can be used" in message
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["left_out"] == {"short": "empty or too short audio"}
    # A recording that is repaired is read again.
    assert not (tmp_path / "out/work").exists()


# The rest runs in this process, without workers.


@pytest.fixture
def serial(monkeypatch):
    def analyse_all(recordings, bands, work, processes):
        return [analysed(one.id)._replace(recording=one) for one in recordings]

    monkeypatch.setattr(pipeline, "_analyse_all", analyse_all)


def recorded(**changes):
    """The recorded utterances with their splits."""
    return [
        one._replace(split=SPLITS[one.speaker], **changes)
        for one in manifest.recordings(SPEECH / "manifest.jsonl")
    ]


def prepare(out, recordings, corpus="speech", high=7600.0, audio_words=0, **frames):
    folder = pipeline.prepare(
        corpus,
        recordings,
        out,
        high_frequency=high,
        frames={**LIMITS, **frames},
        audio_words=audio_words,
        processes=1,
    )
    return speech_frames.load(str(folder))


def refused(out, recordings, **options):
    with pytest.raises(UserError) as caught:
        prepare(out, recordings, **options)
    return str(caught.value)


def test_limits_and_the_transcripts_left_out(tmp_path, serial):
    recordings = recorded()
    train = by_hash([one.id for one in recordings if one.split == "train"])
    three = sum(len(analysed(name).aligned.states) for name in train[:3])
    whole = prepare(tmp_path / "whole", recordings)
    for limit, count in ((three, 3), (three + 1, 3), (three - 1, 2)):
        corpus = prepare(tmp_path / str(limit), recordings, train=limit)
        assert {one.id for one in corpus.splits["train"]} == set(train[:count])
        left = {" ".join(analysed(name).words) for name in train[count:]}
        transcripts = corpus.metadata["transcripts"]
        assert len(transcripts) == len(left) and set(transcripts) == left
        # The deviation is that of the frames in the set.
        assert corpus.metadata["mel_deviation"] != whole.metadata["mel_deviation"]
        assert len(corpus.splits["validation"]) == len(corpus.splits["test"]) == 4
    corpus = prepare(tmp_path / "test", recordings, test=600)
    assert 0 < len(corpus.splits["test"]) < 4 and corpus.metadata["transcripts"] == []


def test_a_limit_below_the_first_utterance(tmp_path, serial):
    message = refused(tmp_path, recorded(), validation=5)
    assert re.match(r"--validation_frames=5 is less than the first utterance's \d+ frames", message)


@pytest.mark.parametrize(("words", "kept"), [(0, 0), (-1, 4), (1000, 4)])
def test_audio_of_no_and_all_words(tmp_path, serial, words, kept):
    corpus = prepare(tmp_path, recorded(), audio_words=words)
    assert sum(bool(one.audio) for part in corpus.splits.values() for one in part) == kept


def test_another_corpus_in_the_same_folder(tmp_path, serial):
    recordings = recorded()
    bands = features.Bands()
    pipeline._claim(tmp_path, "first", recordings, bands)
    pipeline._claim(tmp_path, "first", recordings, bands)  # the same resumes
    messages = [
        refused(tmp_path, recordings, corpus="second"),
        refused(tmp_path, recordings, corpus="first", high=5000.0),
        refused(tmp_path, recordings[1:], corpus="first"),
    ]
    for message in messages:
        assert message.startswith(f"{tmp_path / 'work'} holds another set half prepared: ")
        assert "Name another --out" in message and "\n" not in message
    assert len(prepare(tmp_path, recordings, corpus="first").splits["train"]) == 8


def test_a_folder_with_a_finished_set(tmp_path, serial):
    prepare(tmp_path, recorded())
    for corpus in ("speech", "another"):
        message = refused(tmp_path, recorded(), corpus=corpus)
        assert message.startswith(
            f"{prepared.folder_of(speech_frames.KIND, tmp_path)} is a prepared set already"
        )
    assert not (tmp_path / "work").exists()


def test_splits_named_after_a_failure(tmp_path, monkeypatch):
    """The parts that a failed run left have its recordings, with no splits in them."""

    def analyse_parts(tasks, processes):
        for path, recordings, _ in tasks:
            found = [analysed(one.id)._replace(recording=one) for one in recordings]
            path.write_bytes(pickle.dumps(found))

    monkeypatch.setattr(pipeline, "_analyse_parts", analyse_parts)
    message = refused(tmp_path, [one._replace(split="train") for one in recorded()])
    assert message == ("speech: no recording falls to validation; name it by `split` in a manifest")
    monkeypatch.setattr(pipeline, "_analyse_parts", None)  # no part is left to do
    corpus = prepare(tmp_path, recorded())
    assert [len(corpus.splits[name]) for name in speech_frames.SPLITS] == [8, 4, 4]


@pytest.mark.parametrize("high", [9000.0, 30.0])
def test_bands_that_can_not_be(tmp_path, high):
    assert "no 40 mel bands" in refused(tmp_path, recorded(), high=high)
    assert not any(tmp_path.iterdir())  # the folder is not claimed for such bands


def test_a_worker_that_dies(tmp_path):
    deadly = [Recording("one", "", "", "train", "hello", functools.partial(os._exit, 9))]
    assert "a process that aligned was killed" in refused(tmp_path, deadly)


@pytest.mark.parametrize("corpus", ["other", "manifest:", "librispeech", "debian:x", ""])
def test_a_corpus_that_is_none(tmp_path, corpus):
    with pytest.raises(UserError, match=f"--corpus={corpus}: expected debian, librispeech:FOLDER"):
        prepare_command.recordings(corpus, tmp_path)
