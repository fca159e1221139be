"""From frames to words: word error rates with a real decoder, and one utterance as an example."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax import processes
from distill_jax.nets import Net
from experiments.common.study import Context, Row, make_row, write_json
from experiments.speech import (
    decoding,
    differences,
    frames,
    intervals,
    language_model,
    nets,
    word_errors,
)
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

    def counted(name: str, net: Net, members: int) -> _Counted:
        """Of so many single members; for 0, of the mean of all."""
        begun = time.monotonic()
        parts = [net.some(m, 1) for m in range(members)] if members else [net]
        found = []
        for number, one in enumerate(parts):
            hypotheses = decoding.decode(
                _log_probs(one, data, spoken),
                data.log_prior,
                data.class_of_state,
                model,
                weights,
                progress=f"{name} {number}" if members else name,
            )
            found.append(word_errors.count(references, hypotheses))
        return _Counted(found, (time.monotonic() - begun) / len(parts))

    kinds = {
        "baseline": counted("member", teacher, config.decoding.members),
        f"{teacher.members}xEnsemble": counted("ensemble", teacher, 0),
        f"distilled, T={config.distilled.temperature:g}": counted(
            "student", students, students.members or 1
        ),
    }
    wrong = {
        row: np.stack([word_errors.by_utterance(one) for one in own.found])
        for row, own in kinds.items()
    }
    words = np.array([len(one.words) for one in spoken])
    return [
        *(
            line
            for (row, own), paper in zip(kinds.items(), (10.9, 10.7, 10.7), strict=True)
            for line in _rows(context, row, own, paper=paper)
        ),
        *_own_model(context, spoken, references, model),
        *differences.rows(config, "word_error_rate", wrong, words, selection=_selection(context)),
    ]


class _Counted(NamedTuple):
    """The word errors of nets of one kind, as `word_errors.count` gives them, and the time of each."""

    found: Sequence[Mapping[str, np.ndarray]]
    seconds: float


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
    found = word_errors.count(references, hypotheses)
    counted = _Counted([found], time.monotonic() - begun)
    row = "the decoder's own acoustic model"
    return _rows(context, row, counted, paper=None, selection="last")


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
    counted: _Counted,
    *,
    paper: float | None,
    selection: str | None = None,
) -> list[Row]:
    totals = [word_errors.total(one) for one in counted.found]
    wrong = np.mean([word_errors.by_utterance(one) for one in counted.found], axis=0)
    more: dict[str, Any] = {
        "paper": paper,
        "interval": intervals.percent(wrong, counted.found[0]["words"]),
    }
    return [
        make_row(
            context.config,
            "speech",
            row,
            metric,
            [one[metric] for one in totals],
            seconds=counted.seconds,
            selection=selection or _selection(context),
            **(more if metric == "word_error_rate" else {}),
        )
        for metric in ("word_error_rate", *word_errors.KINDS, "words")
    ]


def _selection(context: Context) -> str | None:
    """On what the decoder's weights were chosen."""
    return "validation" if context.config.decoding.tuning_words else None


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
