"""Forced alignment and log-mel features, on real recordings and on sounds made here."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest

from distill_jax.errors import UserError
from experiments.speech import sphinx
from experiments.speech.corpus import alignment, features, manifest, pipeline
from experiments.speech.corpus.recordings import RATE, Recording, to_mono_16k
from experiments.speech.corpus.text import words

BANDS = features.Bands()
RECORDINGS = {
    one.id: one
    for one in manifest.recordings(Path(__file__).parent / "recordings" / "manifest.jsonl")
}
SOME = ("bass08196", "bass12305", "fotaq_0200A6J1", "fotaq_180008P1")


@functools.cache
def samples_of(name):
    return to_mono_16k(*RECORDINGS[name].read())[0]


def words_of(name):
    return words(RECORDINGS[name].text)


def align(samples, spoken):
    found = alignment.align(samples, spoken)
    assert found is not None
    return found


@functools.cache
def aligned(name):
    return align(samples_of(name), words_of(name))


@functools.cache
def pronunciations():
    """By the dictionary's spelling, "the" and "the(2)" apart, tuples of phones."""
    lines = (line.split() for line in sphinx.dictionary().read_text().splitlines())
    found = {line[0]: tuple(line[1:]) for line in lines}
    return {**found, "<sil>": ("SIL",), "<s>": ("SIL",), "</s>": ("SIL",)}


def spelling(segment):
    return re.sub(r"\(\d+\)$", "", segment)


def is_word(segment):
    return segment[0] not in "<["


def runs(values):
    """Values without repetitions in a row."""
    return tuple(value for i, value in enumerate(values) if i == 0 or value != values[i - 1])


@pytest.mark.parametrize("name", SOME)
def test_states_cover_the_audio(name):
    found, samples = aligned(name), samples_of(name)
    assert found.states.dtype == found.starts.dtype == np.int32
    # 10 ms each; the aligner pads the end, for one frame more than whole windows of 25 ms.
    assert len(found.states) == (len(samples) - 240) // 160 + 1
    assert found.states.min() >= 0 and found.states.max() < sphinx.num_senones()
    assert len(found.starts) == len(found.segments)
    assert found.starts[0] == 0 and (np.diff(found.starts) > 0).all()
    assert found.starts[-1] < len(found.states)


@pytest.mark.parametrize("name", SOME)
def test_segments_are_the_words_with_silences_between(name):
    found = [spelling(segment) for segment in aligned(name).segments if is_word(segment)]
    assert found == words_of(name)


@pytest.mark.parametrize("name", SOME)
def test_states_spell_the_words(name):
    found, phones = aligned(name), sphinx.phone_names()
    parts = np.split(found.states, found.starts[1:])
    for segment, states in zip(found.segments, parts, strict=True):
        # No word here has one phone twice in a row, and each lasts three states at least.
        heard = runs([phones[state] for state in states])
        if is_word(segment):
            assert heard == runs(pronunciations()[segment]), segment
        assert len(states) >= 3 * len(heard)


def test_states_of_a_phone_come_in_their_order():
    """Left to right through the phone's three states, of which senones are variants."""
    places = sphinx.phone_states() % 3
    for name in SOME:
        steps = runs((places[aligned(name).states]).tolist())
        assert steps == tuple(i % 3 for i in range(len(steps)))


def test_silence_is_where_it_is_quiet():
    loud = features.log_mels(samples_of("bass12305"), BANDS).mean(axis=1)
    states = aligned("bass12305").states[: len(loud)]
    silent = np.array(sphinx.phone_names())[states] == "SIL"
    assert silent.any() and loud[silent].mean() < loud[~silent].mean() - 3


def test_words_are_found_where_they_are_spoken():
    first, second = (samples_of(name) for name in SOME[:2])
    both = align(np.concatenate([first, second]), words_of(SOME[0]) + words_of(SOME[1]))
    spoken = [i for i, segment in enumerate(both.segments) if is_word(segment)]
    start = both.starts[spoken[len(words_of(SOME[0]))]]
    inner = next(i for i, s in enumerate(aligned(SOME[1]).segments) if is_word(s))
    expected = len(first) / 160 + aligned(SOME[1]).starts[inner]
    assert start == pytest.approx(expected, abs=5)


def test_an_alignment_does_not_depend_on_those_before():
    again = [align(samples_of(name), words_of(name)) for name in reversed(SOME)]
    for name, found in zip(reversed(SOME), again, strict=True):
        np.testing.assert_array_equal(found.states, aligned(name).states)
        assert found.segments == aligned(name).segments


def test_no_path_through_the_words():
    name = "fotaq_180008P1"
    everything = [word for other in RECORDINGS for word in words_of(other)]
    assert alignment.align(samples_of(name), everything) is None
    for length in (0, 1, 400, 1600, 4800):
        assert alignment.align(samples_of(name)[:length], words_of(name)) is None
    assert alignment.align(samples_of(name), []) is None
    assert alignment.align(samples_of(name), ["xqzt"]) is None
    # The aligner still works after those.
    found = align(samples_of(name), words_of(name))
    np.testing.assert_array_equal(found.states, aligned(name).states)


def test_unknown_words():
    assert alignment.unknown_words(["hello", "xqzt", "don't", "zzyzxq"]) == ["xqzt", "zzyzxq"]
    assert alignment.unknown_words(words_of(SOME[0])) == alignment.unknown_words([]) == []


def test_missing_acoustic_model(monkeypatch, tmp_path):
    monkeypatch.setenv("POCKETSPHINX_PATH", str(tmp_path))
    alignment._decoder.cache_clear()
    try:
        with pytest.raises(UserError, match=r"no acoustic model .*pip install pocketsphinx"):
            alignment.unknown_words(["hello"])
    finally:
        alignment._decoder.cache_clear()


def test_what_is_analysed_agrees_in_length():
    for name in SOME[:2]:
        one = pipeline.analyse(RECORDINGS[name], BANDS)
        assert one.status == "aligned" and list(one.words) == words_of(name)
        assert len(one.aligned.states) == len(one.log_mels) == (len(samples_of(name)) - 240) // 160
        np.testing.assert_array_equal(one.aligned.states, aligned(name).states[: len(one.log_mels)])
        assert one.aligned.starts[-1] < len(one.log_mels)


def recording(read, text="hello"):
    return Recording("made", "", "", "", text, read)


def broken():
    raise UserError("some.flac: damaged")


def seconds(length, text="hello"):
    return recording(lambda: (np.zeros(int(length * RATE), np.float32), RATE), text)


@pytest.mark.parametrize(
    ("made", "status"),
    [
        (seconds(1, "..."), "no words in the transcript"),
        (seconds(1, "Hello, xqzt Zzyzxq!"), "words that the dictionary lacks: xqzt zzyzxq"),
        (recording(broken), "unreadable audio: some.flac: damaged"),
        (seconds(0), "empty or too short audio"),
        (seconds(0.11), "empty or too short audio"),
        (seconds(0.2, "hello " * 20), "the words don't fit the audio"),
    ],
)
def test_what_can_not_be_used(made, status):
    one = pipeline.analyse(made, BANDS)
    assert one.status == status
    assert len(one.log_mels) == len(one.aligned.states) == 0 and not one.digest


@pytest.mark.parametrize("length", [0, 1, 399, 400, 401, 559, 560, 16000])
def test_number_of_frames(length):
    found = features.log_mels(np.ones(length, np.int16), BANDS)
    assert found.dtype == np.float32
    assert found.shape == (0 if length < 400 else (length - 240) // 160, 40)


def mel(frequency):
    return 1127 * np.log(1 + np.asarray(frequency) / 700)


@pytest.mark.parametrize("high", [5000.0, 7600.0])
@pytest.mark.parametrize("frequency", [150, 440, 1000, 2500, 4700])
def test_a_tone_peaks_in_its_band(frequency, high):
    tone = 8000 * np.sin(2 * np.pi * frequency * np.arange(RATE // 2) / RATE)
    found = features.log_mels(tone.astype(np.int16), features.Bands(high=high)).mean(axis=0)
    centres = np.linspace(mel(64), mel(high), 42)[1:-1]
    # Low bands are narrower than the window's resolution.
    assert abs(int(found.argmax()) - int(np.abs(centres - mel(frequency)).argmin())) <= 1
    far = np.abs(centres - mel(frequency)) > 400
    assert found[far].max() < found.max() - 5


def reference(samples, low, high):
    """Log-mel energies in plain NumPy, float64."""
    windows = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float64), 400)[::160]
    windows = windows - windows.mean(axis=1, keepdims=True)
    before = np.concatenate([windows[:, :1], windows[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft((windows - 0.97 * before) * np.hamming(400), 512)) ** 2
    bins, edges = mel(np.arange(257) * RATE / 512), np.linspace(mel(low), mel(high), 42)
    left, centre, right = (edges[i : i + 40, None] for i in range(3))
    slopes = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    return np.log(np.maximum(power @ np.maximum(slopes, 0).T, 1.0))


@pytest.mark.parametrize("bands", [BANDS, features.Bands(20.0, 5000.0)])
def test_log_mels_are_those_of_numpy(bands):
    sounds = [samples_of(name) for name in SOME[1:3]]
    sounds.append((3000 * np.random.default_rng(0).standard_normal(8000)).astype(np.int16))
    sounds.append(np.concatenate([np.zeros(4000), np.ones(2000), sounds[0]]).astype(np.int16))
    for sound in sounds:
        found = features.log_mels(sound, bands)
        # Measured: 1e-4 on speech, in float32.
        np.testing.assert_allclose(found, reference(sound, *bands), atol=1e-3, rtol=0)


def test_digital_silence_is_not_far_below_all_sound():
    assert (features.log_mels(np.zeros(1000, np.int16), BANDS) == 0).all()


@pytest.mark.parametrize("high", [9000.0, 100.0, 30.0])
def test_bands_that_can_not_be(high):
    with pytest.raises(UserError, match=f"no 40 mel bands lie between 64.0 and {high} Hz"):
        features.log_mels(np.zeros(0, np.int16), features.Bands(high=high))


def test_quantising_is_exact_to_half_a_step():
    log_mels = features.log_mels(samples_of(SOME[0]), BANDS)
    deviation = np.linspace(2, 5, 40)
    found = features.quantise(log_mels, deviation)
    assert found.dtype == np.uint8 and found.shape == log_mels.shape
    expected = (log_mels - log_mels.mean(axis=0)) / deviation
    back = (found.astype(np.float64) - features.ZERO) / features.STEPS
    assert found.min() > 0 and found.max() < 255
    assert np.abs(back - expected).max() <= 0.5 / features.STEPS + 1e-5
    # Louder by a factor is the same.
    np.testing.assert_allclose(
        features.quantise(log_mels + np.float32(2), deviation).astype(int), found, atol=1
    )


def test_quantising_clips():
    log_mels = np.zeros((100, 40), np.float32)
    log_mels[0], log_mels[1] = 1000, -1000
    found = features.quantise(log_mels, np.ones(40))
    assert (found[0] == 255).all() and (found[1] == 0).all() and (found[2:] == features.ZERO).all()
