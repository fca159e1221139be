"""Decoding: scores into the decoder and words out, against the decoder's own path and by hand."""

import json
from pathlib import Path

import numpy as np
import pocketsphinx
import pytest
import soundfile

from distill_jax.errors import UserError
from experiments.speech import decoding, language_model, sphinx, word_errors
from experiments.speech.decoding import Search, Weights

SPEECH = Path(__file__).parent / "recordings"
TIGHT = Search(max_states=1000, max_words=20, second_pass=False)
ROWS = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()][1::3]
TEXTS = [
    "".join(letter for letter in row["text"].lower() if letter.isalpha() or letter in "' ").split()
    for row in ROWS
]
REFERENCES = [" ".join(words) for words in TEXTS]
OTHERS = ["you are a long way from home", "i have a good reason to get out of here", "they're mad"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sentences = [*TEXTS, *(text.split() for text in OTHERS)]
    return language_model.write(sentences, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def audio():
    return [soundfile.read(SPEECH / row["audio"], dtype="int16")[0] for row in ROWS]


@pytest.fixture(scope="module")
def own(audio, model, tmp_path_factory):
    """The wheel's own class decodes audio and keeps its senone scores: words, log-likelihoods."""
    words, scores = [], []
    for samples in audio:  # a new one each time, for what it knows of noise outlives an utterance
        directory = tmp_path_factory.mktemp("scores")
        decoder = pocketsphinx.Decoder(
            lm=str(model.trigrams),
            dict=str(model.dictionary),
            maxhmmpf=TIGHT.max_states,
            maxwpf=TIGHT.max_words,
            fwdflat=False,
            compallsen=True,
            pl_window=0,
            senlogdir=str(directory),
            loglevel="FATAL",
        )
        decoder.start_utt()
        decoder.process_raw(samples.tobytes(), full_utt=True)
        decoder.end_utt()
        words.append(decoder.hyp().hypstr)
        [path] = directory.iterdir()
        data = path.read_bytes()
        start = data.index(b"endhdr\n") + len(b"endhdr\n") + 4
        records = np.frombuffer(data[start:], "<i2").reshape(-1, sphinx.num_senones() + 1)
        scores.append(-records[:, 1:].astype(np.float32) * np.float32(1024 * np.log(1.0001)))
    return words, scores


def identity():
    size = sphinx.num_senones()
    return np.zeros(size, np.float32), np.arange(size, dtype=np.int32)


def test_senones():
    states, names = sphinx.phone_states(), sphinx.phone_names()
    assert sphinx.num_senones() == len(states) == len(names) == 5126
    assert states.dtype == np.int32 and set(states) == set(range(126))
    np.testing.assert_array_equal(states[:126], np.arange(126))
    assert len(set(names)) == 42 and names[6:9] == ["AA"] * 3
    assert all(names[senone] == names[state] for senone, state in enumerate(states))
    # From the model's text: the triphone AA between AA and B at a word's beginning is 162 167 207.
    assert list(states[[162, 167, 207]]) == [6, 7, 8]


def test_own_scores_give_the_words_of_the_decoder_itself(own, model):
    words, scores = own
    found = decoding.decode(scores, *identity(), model, Weights(), search=TIGHT, progress=None)
    assert found == words
    assert word_errors.total(word_errors.count(REFERENCES, found))["word_error_rate"] < 30
    # The same scores are no longer those words where they are of other senones.
    shifted = [np.roll(utterance, 500, axis=1) for utterance in scores[:2]]
    wrong = decoding.decode(shifted, *identity(), model, Weights(), search=TIGHT, progress=None)
    assert wrong != words[:2]


def test_the_language_weight_reaches_the_first_pass(own, model):
    _, scores = own
    search = TIGHT._replace(best_path=False)
    light, heavy = (
        decoding.decode(
            scores,
            *identity(),
            model,
            Weights(language_weight=weight),
            search=search,
            progress=None,
        )
        for weight in (6.5, 300.0)
    )
    assert light != heavy


def test_audio_gives_the_words_of_the_decoder_itself(own, audio, model):
    words, _ = own
    serial = decoding.decode_audio(audio, model, search=TIGHT, threads=1, progress=None)
    assert serial == words
    parallel = decoding.decode_audio(audio, model, search=TIGHT, threads=3, progress=None)
    assert parallel == serial


def test_audio_is_decoded_as_if_alone(audio, model):
    """The library keeps an estimate of the noise from one utterance to the next."""
    options = decoding._options(model, Weights(), search=TIGHT)
    options["senlogdir"] = str(model.trigrams.parent)
    with sphinx.open_decoder(options) as decoder:
        for samples in (audio[0], audio[1], audio[0]):
            sphinx.decode_samples(decoder, samples)
    first, other, again = sorted(model.trigrams.parent.glob("*.sen"))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_parallel_equals_serial(own, model, capsys):
    _, scores = own
    arguments = (scores, *identity(), model, Weights())
    serial = decoding.decode(*arguments, search=TIGHT, threads=1, progress=None)
    assert capsys.readouterr().out == ""
    assert decoding.decode(*arguments, search=TIGHT, threads=4, progress="validation") == serial
    line = capsys.readouterr().out
    assert line.startswith(f"validation: {len(scores)}/{len(scores)} utterances")
    assert line.count("\n") == 1


def test_prior_and_classes_reach_the_decoder(own, model):
    """A net whose classes are permuted, with the prior still in its scores, gives the same words."""
    words, scores = own
    random = np.random.default_rng(0)
    size = sphinx.num_senones()
    order = random.permutation(size)
    log_prior = np.log(random.dirichlet(np.ones(size)) + 1e-9).astype(np.float32)
    joint = [(utterance[:, order] + 0.5 * log_prior).astype(np.float32) / 2 for utterance in scores]
    weights = Weights(acoustic_scale=2.0, prior_scale=0.25)
    classes = np.argsort(order).astype(np.int32)
    found = decoding.decode(joint, log_prior, classes, model, weights, search=TIGHT, progress=None)
    assert found == words


def test_empty_utterance(own, audio, model):
    _, scores = own
    sets = [scores[0][:0], scores[0], scores[0][:0]]
    found = decoding.decode(sets, *identity(), model, Weights(), search=TIGHT, progress=None)
    assert found[0] == found[2] == "" and found[1]
    samples = [audio[0][:0], audio[0], audio[0][:100]]
    found = decoding.decode_audio(samples, model, search=TIGHT, threads=1, progress=None)
    assert found[0] == found[2] == "" and found[1]
    assert decoding.decode([], *identity(), model, Weights(), search=TIGHT) == []


def test_senone_scores_are_those_of_a_loop():
    random = np.random.default_rng(1)
    log_probs = np.log(random.dirichlet(np.ones(7), 5)).astype(np.float32)
    log_prior = np.log(random.dirichlet(np.ones(7))).astype(np.float32)
    classes = random.integers(-1, 7, sphinx.num_senones()).astype(np.int32)
    weights = Weights(acoustic_scale=0.3, prior_scale=0.6)
    found = decoding.senone_scores(log_probs, log_prior, classes, weights)
    assert found.dtype == np.float32 and found.shape == (5, sphinx.num_senones())
    for frame, row in enumerate(log_probs.astype(np.float64)):
        present = [row[k] - 0.6 * np.float64(log_prior[k]) for k in range(7)]
        expected = [0.3 * (present[k] if k >= 0 else min(present) - 1) for k in classes]
        np.testing.assert_allclose(found[frame], expected, rtol=1e-5, atol=1e-6)


def test_costs_are_capped_steps_below_the_best():
    step = 1024 * np.log(1.0001)
    scores = np.array([[-5.0, -5.0 - 3 * step, -1e6], [-2.4 * step, 0.0, -np.inf]], np.float32)
    costs = decoding._costs(scores)
    assert costs.dtype == np.int16
    np.testing.assert_array_equal(costs, [[0, 3, 32000], [2, 0, 32000]])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"log_probs": np.zeros((2, 6))}, r"log_probs has the shape \(2, 6\), not \[n, 7\]"),
        ({"log_probs": np.full((2, 7), np.nan)}, "NaN"),
        ({"log_prior": np.full(7, -np.inf)}, "log_prior isn't finite"),
        ({"class_of_senone": np.zeros(126, int)}, r"shape \(126,\), not \[5126\]"),
        ({"class_of_senone": np.full(5126, 7)}, "within -1 and 6, for 7 classes"),
        ({"class_of_senone": np.full(5126, -2)}, "within -1 and 6, for 7 classes"),
    ],
)
def test_wrong_scores(change, message, model):
    good = {
        "log_probs": np.zeros((2, 7)),
        "log_prior": np.zeros(7),
        "class_of_senone": np.zeros(5126, int),
    }
    decoding.senone_scores(**good, weights=Weights())
    bad = {**good, **change}
    with pytest.raises(UserError, match=message):
        decoding.senone_scores(**bad, weights=Weights())
    with pytest.raises(UserError, match=message):
        decoding.decode(
            [bad["log_probs"]] * 3,
            bad["log_prior"],
            bad["class_of_senone"],
            model,
            Weights(),
            progress=None,
        )


def test_audio_must_be_int16(model):
    with pytest.raises(UserError, match="utterance 0: audio must be int16"):
        decoding.decode_audio([np.zeros(1600, np.float32)], model, progress=None)


def ngrams(path):
    """The n-grams of an ARPA file with their probabilities."""
    found, order = {}, 0
    for line in path.read_text().splitlines():
        if line.endswith("-grams:"):
            order = int(line[1])
        elif order and line and not line.startswith("\\"):
            fields = line.split()
            found[tuple(fields[1 : order + 1])] = 10 ** float(fields[0])
    return found


def test_trigrams_of_a_toy_text(tmp_path):
    sentences = ["a big dog", "a big cat", "a zzxqy cat", ""]
    words = language_model.write_trigrams([s.split() for s in sentences], tmp_path / "toy.arpa")
    assert words == {"a", "big", "dog", "cat"}
    found = ngrams(tmp_path / "toy.arpa")
    bigrams = {"<s> a", "a big", "big dog", "big cat", "dog </s>", "cat </s>"}
    trigrams = {"<s> a big", "a big dog", "a big cat", "big dog </s>", "big cat </s>"}
    expected = {"<s>", "</s>", *words, *bigrams, *trigrams}
    assert {" ".join(gram) for gram in found} == expected
    # Half of the mass is kept for shorter histories: 0.5 * 2/10, 0.5 * 2/2, 0.5 * 1/2.
    assert found["big",] == pytest.approx(0.1, rel=1e-3)
    assert found["a", "big"] == pytest.approx(0.5, rel=1e-3)
    assert found["a", "big", "dog"] == pytest.approx(0.25, rel=1e-3)


def test_no_sentence_left(tmp_path):
    with pytest.raises(UserError, match=r"toy\.arpa: no sentence to count"):
        language_model.write_trigrams([["zzxqy"], []], tmp_path / "toy.arpa")


def test_dictionary_is_cut_to_the_words(tmp_path):
    model = language_model.write([["i", "read"]], tmp_path / "new")
    assert model == language_model.in_directory(tmp_path / "new")
    lines = model.dictionary.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["i", "read", "read(2)"]
    whole = sphinx.dictionary().read_text().splitlines()
    assert set(lines) <= set(whole)
    assert {"read", "i"} <= language_model.vocabulary()
    assert not {"read(2)", "zzxqy"} & language_model.vocabulary()


def test_tune_finds_the_scale(own, model):
    _, scores = own
    grid = {"acoustic_scale": [0.01, 1.0], "word_insertion_penalty": [0.65, 1e-30]}
    best, tried = decoding.tune(
        scores[:3],
        REFERENCES[:3],
        *identity(),
        model,
        grid=grid,
        start=Weights(acoustic_scale=0.01),
        search=TIGHT,
        progress=None,
    )
    assert best == Weights(acoustic_scale=1.0)
    assert [(point["acoustic_scale"], point["word_insertion_penalty"]) for point in tried] == [
        (0.01, 0.65),
        (1.0, 0.65),
        (1.0, 1e-30),
    ]
    rates = [point["word_error_rate"] for point in tried]
    assert rates[1] < min(rates[0], rates[2])


def test_tune_goes_by_one_weight_after_another(monkeypatch, model, capsys):
    """Every weight that isn't the goal's costs a word, so each has its best value by itself."""
    goal = Weights(2.0, 0.5, 3.0, 1.0)
    asked = []

    def decode(score_sets, log_prior, classes, model, weights, **options):
        asked.append(weights)
        wrong = sum(value != wanted for value, wanted in zip(weights, goal, strict=True))
        return ["right" + " wrong" * wrong]

    monkeypatch.setattr(decoding, "decode", decode)
    grid = {name: [value, 9.0, 7.0] for name, value in reversed(goal._asdict().items())}
    start = Weights()
    best, tried = decoding.tune([], ["right"], *identity(), model, grid=grid, start=start)
    assert best == goal
    assert len(asked) == len(set(asked)) == len(tried) == 1 + 4 * 3
    assert asked[1] == start._replace(word_insertion_penalty=1.0)
    assert json.loads(json.dumps(tried)) == tried
    assert capsys.readouterr().out.count(" % at acoustic_scale") == len(tried)
    with pytest.raises(UserError, match=r"'acoustic'.* not among the weights"):
        decoding.tune([], ["right"], *identity(), model, grid={"acoustic": [1.0]})


def test_tune_keeps_the_start_where_nothing_is_better(monkeypatch, model):
    monkeypatch.setattr(decoding, "decode", lambda *arguments, **options: ["right"])
    best, tried = decoding.tune([], ["right"], *identity(), model, progress=None)
    assert best == decoding.START and len(tried) > len(decoding.GRID)


def test_missing_model(monkeypatch, tmp_path, model):
    monkeypatch.setattr(pocketsphinx, "get_model_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"en-us/en-us: .* missing"):
        sphinx.acoustic_model()
    (tmp_path / "en-us/en-us").mkdir(parents=True)
    with pytest.raises(UserError, match=r"en-us/mdef: .* missing"):
        sphinx.acoustic_model()
    with pytest.raises(UserError, match=r"en-us/mdef: .* missing"):
        decoding.decode_audio([np.zeros(1600, np.int16)], model, progress=None)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pocketsphinx", None)
    with pytest.raises(UserError, match="needs the package pocketsphinx 5"):
        sphinx.dictionary()


def test_wrong_language_model(model, tmp_path):
    samples = [np.zeros(1600, np.int16)]
    gone = model._replace(trigrams=tmp_path / "gone.arpa")
    with pytest.raises(UserError, match=r"gone\.arpa: no such file, to be the decoder's 'lm'"):
        decoding.decode_audio(samples, gone, progress=None)
    (tmp_path / "bad.arpa").write_text("no trigrams\n")
    bad = model._replace(trigrams=tmp_path / "bad.arpa")
    with pytest.raises(UserError, match="can't make a decoder"):
        decoding.decode_audio(samples, bad, progress=None)
