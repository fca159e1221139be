"""A corpus split by scenes and speakers; the study's classes and cases: tied states, priors."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from distill_jax.errors import UserError
from experiments.speech import data as speech
from experiments.speech import speech_frames
from experiments.speech.config import get_config
from experiments.speech.corpus import pipeline
from experiments.speech.corpus.recordings import Recording

# Six states; 0 and 1 are those of two phones, of which 2, 3 and 4, 5 are variants.
PHONE_STATES = np.array([0, 1, 0, 0, 1, 1], np.int32)


def test_tie_by_hand():
    counts = np.array([50, 0, 10, 9, 3, 10])
    # States 0, 2 and 5 have classes of their own; 3 shares that of phone state 0, 1 and 4 that of 1.
    classes, number = speech.tie(counts, PHONE_STATES, 10)
    assert (classes.dtype, classes.tolist(), number) == (np.int32, [0, 4, 1, 3, 4, 2], 5)


def test_tie_without_a_minimum_ties_what_training_never_saw():
    counts = np.array([50, 0, 10, 9, 0, 1])
    classes, number = speech.tie(counts, PHONE_STATES, 0)
    assert (classes.tolist(), number) == ([0, 4, 1, 2, 4, 3], 5)
    one, _ = speech.tie(counts, PHONE_STATES, 1)
    assert one.tolist() == classes.tolist()


def test_all_tied():
    classes, number = speech.tie(np.ones(6, int), PHONE_STATES, 100)
    assert (classes.tolist(), number) == (PHONE_STATES.tolist(), 2)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(0, 30))
def test_ties_stay_within_a_phone_state(seed, least):
    random = np.random.default_rng(seed)
    phone_states = np.sort(random.integers(0, 5, 40))
    counts = random.integers(0, 40, 40)
    classes, number = speech.tie(counts, phone_states, least)
    assert sorted(set(classes.tolist())) == list(range(number))
    for of_class in range(number):
        members = np.flatnonzero(classes == of_class)
        assert len(set(phone_states[members].tolist())) == 1
        assert len(members) == 1 or (counts[members] < max(least, 1)).all()
    for state in np.flatnonzero(counts >= max(least, 1)):
        assert (classes == classes[state]).sum() == 1


def test_states_that_the_metadata_lacks():
    with pytest.raises(UserError, match=r"states up to 6, its metadata names 6"):
        speech.tie(np.ones(7, int), PHONE_STATES, 1)


def utterance(name, speaker, states):
    states = np.array(states, np.int32)
    frames = np.random.default_rng(len(name) + len(states)).integers(
        0, 256, (len(states), 40), np.uint8
    )
    starts = np.zeros(1, np.int32)
    return speech_frames.Utterance(name, speaker, ("word",), frames, states, ("word",), starts)


TRAIN = [
    utterance("a", "ann", [0] * 6 + [2] * 4),
    utterance("b", "bob", [5] * 7 + [3]),
    utterance("c", "ann", [0] * 3),
]
SETS = {
    "train": TRAIN,
    "validation": [utterance("v", "ann", [3, 4])],
    "test": [utterance("t", "eve", [4, 1, 0]), utterance("u", "bob", [2, 2])],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    metadata = {"phone_states": PHONE_STATES.tolist(), "byte": [128, 12]}
    makers = {name: lambda part=part: iter(part) for name, part in SETS.items()}
    return str(speech_frames.write(tmp_path_factory.mktemp("set"), makers, metadata))


def load(source, min_frames=4, **limits):
    fields = {f"{split}_frames": limits.get(split, 0) for split in speech_frames.SPLITS}
    return speech.load_data(
        ConfigDict(
            {"data": {"source": source, "min_frames": min_frames, "block_frames": 0, **fields}}
        )
    )


def test_cases(source):
    data = load(source)
    # Own: 0 (9 frames), 2 (4), 5 (7). Tied: 3 (1 frame) to phone state 0; 1 and 4 (none) to 1.
    assert data.num_classes == 5
    assert data.class_of_state.tolist() == [0, 4, 1, 3, 4, 2]
    for name in speech_frames.SPLITS:
        cases, part = getattr(data, name), data.corpus.splits[name]
        assert {one.id for one in part} == {one.id for one in SETS[name]}
        states = np.concatenate([one.states for one in part])
        np.testing.assert_array_equal(cases["label"], data.class_of_state[states])
        np.testing.assert_array_equal(
            cases["frames"][cases["position"]], np.concatenate([one.frames for one in part])
        )
        assert cases["label"].dtype == np.int32
    assert data.byte == (128.0, 12.0)


def test_log_prior_is_that_of_the_training_labels(source):
    data = load(source)
    assert (data.log_prior.dtype, data.log_prior.shape) == (np.float32, (5,))
    assert np.exp(data.log_prior.astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)
    # 21 frames: 9, 4, 7, 1 and none, each with half a frame more.
    expected = np.log(np.array([9.5, 4.5, 7.5, 1.5, 0.5]) / 23.5)
    np.testing.assert_allclose(data.log_prior, expected, rtol=1e-6)


def test_unheard_are_the_frames_of_new_speakers(source):
    data = load(source)
    speakers = {one.id: one.speaker for one in data.corpus.splits["test"]}
    assert speakers == {"t": "eve", "u": "bob"}
    order = [one.id for one in data.corpus.splits["test"]]
    expected = np.concatenate([np.full(len("..." if i == "t" else ".."), i == "t") for i in order])
    assert data.unheard.dtype == bool
    np.testing.assert_array_equal(data.unheard, expected)


def test_states_that_training_lacks_have_classes(source):
    data = load(source)
    labels = {one.id: data.class_of_state[one.states] for one in data.corpus.splits["test"]}
    assert labels["t"].tolist() == [4, 4, 0]
    assert np.isfinite(data.log_prior[4])


def test_limits_take_whole_utterances(source):
    order = [one.id for one in load(source).corpus.splits["train"]]
    lengths = {one.id: len(one.states) for one in TRAIN}
    two = sum(lengths[i] for i in order[:2])
    for limit, count in ((two - 1, 1), (two, 2), (two + 1, 2), (20, 2), (21, 3), (1000, 3)):
        found = [one.id for one in speech.first_frames(_ordered(order), limit, "key")]
        assert found == order[:count], limit
    data = load(source, train=two)
    assert [one.id for one in data.corpus.splits["train"]] == order[:2]
    assert len(data.train["label"]) == two
    assert len(data.test["label"]) == 5
    # Speakers and priors are those of what is left.
    assert data.fingerprint != load(source).fingerprint


def _ordered(order):
    by_id = {one.id: one for one in TRAIN}
    return [by_id[i] for i in order]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (-1, "data.train_frames is -1, expected 0 (all) or more"),
        (2, "data.train_frames is 2, less"),
    ],
)
def test_limits_that_leave_nothing(source, limit, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(source, train=limit)


def test_the_preset_full_names_the_command_that_prepares_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "python -m experiments.speech.prepare --corpus=debian --out=.*runs/debian"
    with pytest.raises(UserError, match=command):
        speech.check_source(get_config("full"))


def test_the_fingerprint_is_of_the_classes_too(source):
    # Of 5 and 4 frames needed, either gives 5 classes, in another order.
    one, other = load(source, min_frames=1), load(source, min_frames=4)
    assert one.num_classes == other.num_classes == 5
    assert one.class_of_state.tolist() != other.class_of_state.tolist()
    assert one.fingerprint != other.fingerprint
    assert load(source, min_frames=1).fingerprint == one.fingerprint


def made_up(count, speakers=100, scenes=150, seed=0, **changes):
    """Recordings of many speakers in scenes that some share."""
    random = np.random.default_rng(seed)
    return [
        pipeline.Analysed(
            Recording(
                f"r{i}",
                f"s{random.integers(speakers)}",
                f"c{random.integers(scenes)}",
                "",
                "",
                _no_audio,
            )._replace(**changes),
            "aligned",
        )
        for i in range(count)
    ]


def _no_audio():
    raise AssertionError("a split needs no audio")


def sides(parts, field):
    found: dict[str, set[str]] = {}
    for name, part in parts.items():
        for one in part:
            found.setdefault(getattr(one.recording, field), set()).add(name)
    return found


def test_split_keeps_scenes_together():
    usable = made_up(4000, speakers=20, scenes=1000)  # no speaker is rare
    parts = pipeline._split(usable)
    assert list(parts) == list(speech_frames.SPLITS)
    assert sorted(one.recording.id for part in parts.values() for one in part) == sorted(
        one.recording.id for one in usable
    )
    assert all(len(names) == 1 for names in sides(parts, "scene").values())
    shares = {name: len(part) / len(usable) for name, part in parts.items()}
    assert shares == pytest.approx({"train": 0.87, "validation": 0.05, "test": 0.08}, abs=0.03)


def test_split_holds_speakers_out_with_their_scenes():
    usable = made_up(1000, speakers=100, scenes=600)
    parts = pipeline._split(usable)
    assert all(len(names) == 1 for names in sides(parts, "scene").values())
    held_out = [name for name, found in sides(parts, "speaker").items() if found == {"test"}]
    assert 2 <= len(held_out) <= 20
    assert 0.05 < len(parts["test"]) / len(usable) < 0.4


def test_split_without_scenes_or_speakers():
    parts = pipeline._split(made_up(2000, scene="", speaker=""))
    shares = [len(parts[name]) / 2000 for name in speech_frames.SPLITS]
    assert shares == pytest.approx([0.87, 0.05, 0.08], abs=0.03)


def test_given_splits_are_respected():
    for split in speech_frames.SPLITS:
        parts = pipeline._split(made_up(300, split=split))
        assert [len(parts[name]) for name in speech_frames.SPLITS] == [
            300 if name == split else 0 for name in speech_frames.SPLITS
        ]


def test_split_does_not_depend_on_the_order_or_on_other_scenes():
    usable = made_up(1000, speakers=20, scenes=600)
    parts = sides(pipeline._split(usable), "id")
    assert sides(pipeline._split(usable[::-1]), "id") == parts
    some = sides(pipeline._split(usable[:500]), "id")
    assert all(parts[name] == found for name, found in some.items())


def test_copies_are_of_the_first_in_the_order():
    digests = ["x", "y", "x", "", "", "x"]
    found = pipeline._without_copies(
        [one._replace(digest=d) for one, d in zip(made_up(6), digests, strict=True)]
    )
    copy = "the same audio as another recording: r0"
    assert [one.status for one in found] == ["aligned", "aligned", copy, *["aligned"] * 2, copy]
