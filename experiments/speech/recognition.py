"""From frames to words: word error rates with a real decoder, and one utterance as an example."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax import processes
from distill_jax.nets import Net
from experiments.common.study import Context, Row, make_row, write_json
from experiments.speech import decoding, frames, language_model, nets
from experiments.speech.data import Data, load_data
from experiments.speech.speech_frames import Utterance

_COUNTED = 100  # a phone with fewer frames in the test set is left out of the confusions


def recognise(context: Context) -> list[Row]:
    """Word error rates of members, ensemble, students and of the decoder's own acoustic model.

    The language model is estimated from the training transcripts. The weights of the decoder are tuned
    with the ensemble on validation utterances and are the same for all nets. The decoder's own acoustic
    model uses the default weights and wide beams.
    """
    return _recognise(context, nets.load_ensemble(context), nets.load_students(context)) or []


@processes.main_only  # decoding takes the whole machine
def _recognise(context: Context, teacher: Net, students: Net) -> list[Row]:
    config, data = context.config, load_data(context.config)
    write_json(context.directory / "example.json", _example(data, teacher, students))
    write_json(context.directory / "confusions.json", _confusions(data, teacher, students))
    transcripts = training_transcripts(data)
    model = language_model.write(transcripts, context.directory / "language_model")
    weights = _tune(context, data, model, teacher)
    spoken = first_words(_with_audio(data), config.decoding.words)
    references = [" ".join(one.words) for one in spoken]
    _print_unknown(spoken, transcripts)

    def rates(name: str, row: str, net: Net, count: int, paper: float) -> list[Row]:
        """The rows of `count` single members; for 0, of the mean of all members."""
        begun = time.monotonic()
        parts = [net.some(m, 1) for m in range(count)] if count else [net]
        found = []
        for number, one in enumerate(parts):
            hypotheses = decoding.decode(
                _log_probs(one, data, spoken),
                data.log_prior,
                data.class_of_state,
                model,
                weights,
                progress=f"{name} {number}" if count else name,
            )
            found.append(decoding.word_errors(references, hypotheses))
        return _rows(context, row, found, (time.monotonic() - begun) / len(parts), paper=paper)

    together = f"{teacher.members}xEnsemble"
    distilled = f"distilled, T={config.distilled.temperature:g}"
    return [
        *rates("member", "baseline", teacher, config.decoding.members, 10.9),
        *rates("ensemble", together, teacher, 0, 10.7),
        *rates("student", distilled, students, students.members or 1, 10.7),
        *_own_model(context, spoken, references, model),
    ]


def _own_model(
    context: Context,
    spoken: Sequence[Utterance],
    references: Sequence[str],
    model: language_model.LanguageModel,
) -> list[Row]:
    """The rows of the decoder's own acoustic model; none if the set has no recordings."""
    if not all(one.audio for one in spoken):
        return []
    begun = time.monotonic()
    hypotheses = decoding.decode_audio(
        [one.samples() for one in spoken],
        model,
        search=decoding.WIDE,
        progress="decoder's own model",
    )
    found = decoding.word_errors(references, hypotheses)
    row, seconds = "the decoder's own acoustic model", time.monotonic() - begun
    return _rows(context, row, [found], seconds, paper=None, selection="last")


def _print_unknown(spoken: Sequence[Utterance], transcripts: Sequence[Sequence[str]]) -> None:
    known = {word for words in transcripts for word in words}
    words = [word for one in spoken for word in one.words]
    share = 100.0 * sum(word not in known for word in words) / len(words)
    print(f"{len(words)} test words, {share:.1f} % of them not in the training transcripts")


def training_transcripts(data: Data) -> list[Sequence[str]]:
    """The words of all training utterances, including those of which the set has only transcripts."""
    spoken: list[Sequence[str]] = [one.words for one in data.corpus.splits["train"]]
    return spoken + [line.split() for line in data.corpus.metadata["transcripts"]]


def first_words(utterances: Sequence[Utterance], words: int) -> list[Utterance]:
    """The first utterances with at most `words` words in all, but at least one; all for 0."""
    ends = np.cumsum([len(one.words) for one in utterances])
    count = int(np.searchsorted(ends, words, side="right")) if words else len(utterances)
    return list(utterances[: max(count, 1)])


def _rows(
    context: Context,
    row: str,
    found: Sequence[dict[str, float]],
    seconds: float,
    *,
    paper: float | None,
    selection: str | None = None,
) -> list[Row]:
    tuned = "validation" if context.config.decoding.tuning_words else None
    return [
        make_row(
            context.config,
            "speech",
            row,
            metric,
            [one[metric] for one in found],
            seconds=seconds,
            paper=paper if metric == "word_error_rate" else None,
            selection=selection or tuned,
        )
        for metric in ("word_error_rate", "substitutions", "deletions", "insertions", "words")
    ]


def _with_audio(data: Data) -> Sequence[Utterance]:
    """Test utterances with recordings, so that all rows have the same utterances; else all."""
    test = data.corpus.splits["test"]
    return [one for one in test if one.audio] or test


def _log_probs(net: Net, data: Data, spoken: Sequence[Utterance]) -> list[np.ndarray]:
    """The log-probabilities `[n, C]` of every utterance."""
    states = [data.class_of_state[one.states] for one in spoken]
    found = nets.log_probs(net, frames.pack([one.frames for one in spoken], states))
    return np.split(found, np.cumsum([len(own) for own in states])[:-1])


def _tune(
    context: Context, data: Data, model: language_model.LanguageModel, net: Net
) -> decoding.Weights:
    words = context.config.decoding.tuning_words
    if not words:
        return decoding.START
    spoken = first_words(data.corpus.splits["validation"], words)
    weights, tried = decoding.tune(
        _log_probs(net, data, spoken),
        [" ".join(one.words) for one in spoken],
        data.log_prior,
        data.class_of_state,
        model,
    )
    write_json(context.directory / "tuning.json", tried)
    return weights


def _phones_of_classes(data: Data) -> list[str]:
    """The phone of each class; the states of a class all belong to one phone."""
    names = data.corpus.metadata["phones"]
    phones = [""] * data.num_classes
    for state, number in enumerate(data.class_of_state):
        phones[number] = names[state]
    return phones


def _example(data: Data, teacher: Net, students: Net) -> dict[str, Any]:
    """One test utterance of about 2 seconds, with the predictions of the nets for each frame."""
    spoken = _with_audio(data)
    one = min(spoken, key=lambda one: abs(len(one.states) - 200))
    phones = _phones_of_classes(data)
    names = sorted(set(phones))
    of_phone = np.array([[phone == name for name in names] for phone in phones], np.float32)
    zero, unit = data.byte
    states = data.class_of_state[one.states]
    probabilities = {
        name: np.exp(_log_probs(net, data, [one])[0])
        for name, net in (("ensemble", teacher), ("distilled", students.some(0, 1)))
    }
    return {
        "id": one.id,
        "words": list(one.words),
        "segments": list(one.segments),
        "starts": one.starts.tolist(),
        "phones": [phones[state] for state in states],
        "states": states.tolist(),
        "log_mels": np.round((one.frames.astype(np.float32) - zero) / unit, 2).tolist(),
        "posteriors": {
            name: {"phones": names, "probability": np.round(found @ of_phone, 4).tolist()}
            for name, found in probabilities.items()
        },
        "top_states": {
            name: found.argmax(axis=-1).tolist() for name, found in probabilities.items()
        },
    }


def _confusions(data: Data, teacher: Net, students: Net) -> list[dict[str, Any]]:
    """How often, in per cent, a phone is confused with another; sorted by the ensemble's share."""
    phones = np.array(_phones_of_classes(data))
    said = phones[data.test["label"]]
    found = {
        "ensemble": phones[nets.log_probs(teacher, data.test).argmax(axis=-1)],
        "distilled": phones[nets.log_probs(students.some(0, 1), data.test).argmax(axis=-1)],
    }
    pairs: list[dict[str, Any]] = []
    for phone, count in zip(*np.unique(said, return_counts=True), strict=True):
        here = said == phone
        for other in set(found["ensemble"][here]) - {phone} if count >= _COUNTED else ():
            shares = {
                name: 100.0 * float((taken[here] == other).mean()) for name, taken in found.items()
            }
            pairs.append({"said": str(phone), "found": str(other), **shares})
    return sorted(pairs, key=lambda pair: -pair["ensemble"])[:15]
