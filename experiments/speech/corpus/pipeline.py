"""From recordings to a prepared set: align and analyse each one, split, normalise, write.

The output folder has:

    work/               the alignment of every part of 16 recordings, until the set is written
    report.json         the status of every recording
    speech_frames/      the set
"""

import collections
import functools
import hashlib
import importlib.metadata
import io
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from distill_jax import files
from distill_jax.errors import UserError
from experiments.common import prepared, workers
from experiments.speech import speech_frames, sphinx
from experiments.speech.corpus import alignment, features, text
from experiments.speech.corpus.recordings import RATE, Recording, to_mono_16k
from experiments.speech.speech_frames import SPLITS, Utterance

_PART = 16  # recordings that a killed run loses at most, per process
_SHORTEST = 10  # frames
_HELD_OUT_SPEAKERS, _VALIDATION, _TEST = 8, 5, 8  # per cent


class Analysed(NamedTuple):
    """The analysis of a recording: `status` is "aligned", or the reason why it can't be used."""

    recording: Recording
    status: str
    notes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    digest: str = ""
    log_mels: np.ndarray = np.zeros((0, speech_frames.NUM_MELS), np.float32)  # [n, 40]
    aligned: alignment.Alignment = alignment.NOTHING


def prepare(
    corpus: str,
    recordings: Sequence[Recording],
    out: Path,
    *,
    high_frequency: float,
    frames: Mapping[str, int],
    audio_words: int,
    processes: int = 0,
) -> Path:
    """Prepares a set from recordings; resumes an unfinished one.

    Args:
        corpus: its name, stored in the set.
        recordings: of any length and sampling rate.
        out: folder for all files.
        high_frequency: upper edge of the mel bands, in Hz.
        frames: by split, how many to keep (0: all); utterances are ordered by a hash.
        audio_words: number of test words whose recordings are kept (-1: all).
        processes: number of parallel aligners; 0 for one per core.

    Returns:
        The folder of the set; `report.json` beside it lists the status of every recording.

    Raises:
        UserError: if the folder has a set, or another corpus half prepared; for invalid bands; if no
            recording can be used, or none for one of the splits; for two recordings of one id.
    """
    ids = collections.Counter(one.id for one in recordings)
    if twice := [name for name, count in ids.items() if count > 1]:
        raise UserError(f"{corpus}: {ids[twice[0]]} recordings have the id {twice[0]!r}")
    bands = features.Bands(high=high_frequency)
    features.log_mels(np.zeros(0, np.int16), bands)  # checks the bands before any work is done
    work = _claim(out, corpus, recordings, bands)
    analysed = _analyse_all(recordings, bands, work, processes)
    analysed = _without_copies(analysed)
    usable = [one for one in analysed if one.status == "aligned"]
    _report(out / "report.json", analysed)
    if not usable:
        shutil.rmtree(work)  # so that repaired recordings are read again
        raise UserError(
            f"{corpus}: none of {len(recordings)} recordings can be used; see {out}/report.json"
        )
    whole = _split(usable)
    for name in SPLITS:
        if not whole[name]:
            raise UserError(
                f"{corpus}: no recording falls to {name}; name it by `split` in a manifest"
            )
    splits = {name: _first_frames(whole[name], frames[name], name) for name in SPLITS}
    taken = {one.recording.id for one in splits["train"]}
    deviation = _deviation(splits["train"])
    metadata = {
        "corpus": corpus,
        "bands_hz": list(bands),
        "mel_deviation": deviation.tolist(),
        "aligner": f"pocketsphinx {importlib.metadata.version('pocketsphinx')}, en-us",
        "byte": [features.ZERO, features.STEPS],
        "phone_states": sphinx.phone_states().tolist(),
        "phones": sphinx.phone_names(),
        "recordings": _reasons(analysed),
        "speakers_of_train": len({one.recording.speaker for one in splits["train"]}),
        # For the language model: what --train_frames leaves out is still text.
        "transcripts": [
            " ".join(one.words) for one in whole["train"] if one.recording.id not in taken
        ],
    }
    kept = {"test": _with_audio(splits["test"], audio_words)}
    makers = {
        name: functools.partial(_utterances, splits[name], deviation, kept.get(name, set()))
        for name in SPLITS
    }
    folder = speech_frames.write(out, makers, metadata)
    for name in SPLITS:
        count = sum(len(one.aligned.states) for one in splits[name])
        print(f"{name}: {len(splits[name])} utterances, {count} frames")
    shutil.rmtree(work)
    return folder


def analyse(recording: Recording, bands: features.Bands) -> Analysed:
    """Aligns one recording and computes its features."""
    words = tuple(text.words(recording.text))
    if not words:
        return Analysed(recording, "no words in the transcript")
    unknown = alignment.unknown_words(words)
    if unknown:
        return Analysed(recording, f"words that the dictionary lacks: {' '.join(unknown)}")
    try:
        samples, notes = to_mono_16k(*recording.read())
    except UserError as error:
        return Analysed(recording, f"unreadable audio: {error}")
    log_mels = features.log_mels(samples, bands)
    if len(log_mels) < _SHORTEST:
        return Analysed(recording, "empty or too short audio", tuple(notes), words)
    aligned = alignment.align(samples, words)
    if aligned is None:
        return Analysed(recording, "the words don't fit the audio", tuple(notes), words)
    # The aligner pads the end: it may count one frame more than the filter bank.
    count = min(len(log_mels), len(aligned.states))
    within = aligned.starts < count
    cut = alignment.Alignment(
        aligned.states[:count],
        tuple(s for s, inside in zip(aligned.segments, within, strict=True) if inside),
        aligned.starts[within],
    )
    digest = hashlib.sha256(samples.tobytes()).hexdigest()
    return Analysed(recording, "aligned", tuple(notes), words, digest, log_mels[:count], cut)


def _analyse_part(task: tuple[Path, Sequence[Recording], features.Bands]) -> Path:
    """Analyses a part in a worker and writes it to a file atomically."""
    path, recordings, bands = task
    # A worker of a killed run may still write the same part, so each has its own partial file.
    with files.write_whole(path) as partial:
        partial.write_bytes(pickle.dumps([analyse(one, bands) for one in recordings]))
    return path


def _analyse_all(
    recordings: Sequence[Recording], bands: features.Bands, work: Path, processes: int
) -> list[Analysed]:
    """Analyses the parts that no earlier run has, in parallel, with progress."""
    starts = range(0, len(recordings), _PART)
    paths = [work / f"part_{start // _PART:05d}.pickle" for start in starts]
    tasks = [
        (path, recordings[start : start + _PART], bands)
        for path, start in zip(paths, starts, strict=True)
        if not path.exists()
    ]
    if len(tasks) < len(paths):
        print(f"{len(paths) - len(tasks)} of {len(paths)} parts were aligned before")
    if tasks:
        _analyse_parts(tasks, processes)
    stored = [one for path in paths for one in pickle.loads(path.read_bytes())]
    # The manifest may have changed since a part was stored, for example in its splits.
    return [one._replace(recording=new) for one, new in zip(stored, recordings, strict=True)]


def _analyse_parts(tasks: Sequence[Any], processes: int) -> None:
    workers.run_all(_analyse_part, tasks, processes, "aligned", "parts")


def _claim(out: Path, corpus: str, recordings: Sequence[Recording], bands: features.Bands) -> Path:
    """The folder for the unfinished work on this corpus alone."""
    digest = hashlib.sha256()
    for one in recordings:
        digest.update(f"{one.id}\0{one.text}\0".encode())
    mine = {
        "corpus": corpus,
        "recordings": digest.hexdigest()[:16],
        "recordings_per_part": _PART,
        "bands_hz": list(bands),
    }
    return prepared.claim(speech_frames.KIND, out, mine)


def _without_copies(analysed: Sequence[Analysed]) -> list[Analysed]:
    """Marks recordings whose samples are those of an earlier one: a copy could be on both sides."""
    first: dict[str, str] = {}
    result = []
    for one in analysed:
        if one.digest and one.digest in first:
            one = one._replace(status=f"the same audio as another recording: {first[one.digest]}")
        elif one.digest:
            first[one.digest] = one.recording.id
        result.append(one)
    return result


def _split(usable: Sequence[Analysed]) -> dict[str, list[Analysed]]:
    """Train, validation and test: as given, else whole scenes; some speakers are in test alone, and
    with them the scenes that they speak in."""
    sizes = collections.Counter(one.recording.speaker for one in usable)
    rare = {name for name, size in sizes.items() if name and size <= len(usable) / 50}
    held_out = {name for name in rare if _percentile("speaker " + name) < _HELD_OUT_SPEAKERS}
    theirs = {_scene(one) for one in usable if one.recording.speaker in held_out}
    parts: dict[str, list[Analysed]] = {name: [] for name in SPLITS}
    for one in usable:
        place = _percentile(_scene(one))
        if one.recording.split:
            name = one.recording.split
        elif _scene(one) in theirs or place < _TEST:
            name = "test"
        else:
            name = "validation" if place < _TEST + _VALIDATION else "train"
        parts[name].append(one)
    return parts


def _scene(one: Analysed) -> str:
    return one.recording.scene or one.recording.id


def _percentile(name: str) -> int:
    """0 to 99, by a hash: the same on every machine and in every corpus."""
    return int(hashlib.md5(name.encode()).hexdigest(), 16) % 100


def _by_hash(part: Sequence[Analysed]) -> list[Analysed]:
    """An order by a hash, the same on every machine."""
    return sorted(part, key=lambda one: hashlib.md5(one.recording.id.encode()).hexdigest())


def _first_frames(part: Sequence[Analysed], limit: int, name: str) -> list[Analysed]:
    """Utterances up to a number of frames, in an order by hash; all if the limit is 0."""
    if not limit:
        return list(part)
    order = _by_hash(part)
    ends = np.cumsum([len(one.aligned.states) for one in order])
    kept = order[: int(np.searchsorted(ends, limit, side="right"))]
    if not kept:
        raise UserError(
            f"--{name}_frames={limit} is less than the first utterance's {ends[0]} frames"
        )
    return kept


def _with_audio(part: Sequence[Analysed], words: int) -> set[str]:
    """Ids of utterances with at most that many words in all, in an order by hash."""
    order = _by_hash(part)
    ends = np.cumsum([len(one.words) for one in order])
    count = len(order) if words < 0 else int(np.searchsorted(ends, words, side="right"))
    return {one.recording.id for one in order[:count]}


def _deviation(part: Sequence[Analysed]) -> np.ndarray:
    """Standard deviation of every band `[40]` over frames, after subtracting utterance means."""
    squares = sum(np.var(one.log_mels, axis=0) * len(one.log_mels) for one in part)
    count = sum(len(one.log_mels) for one in part)
    return np.maximum(np.sqrt(squares / count), 1e-3)


def _utterances(
    part: Sequence[Analysed], deviation: np.ndarray, with_audio: set[str]
) -> Iterator[Utterance]:
    for one in part:
        recording, aligned = one.recording, one.aligned
        yield Utterance(
            recording.id,
            recording.speaker,
            one.words,
            features.quantise(one.log_mels, deviation),
            aligned.states,
            aligned.segments,
            aligned.starts,
            _flac(recording) if recording.id in with_audio else b"",
        )


def _flac(recording: Recording) -> bytes:
    samples, _ = to_mono_16k(*recording.read())
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _reasons(analysed: Sequence[Analysed]) -> collections.Counter[str]:
    """Counts recordings by status, without the details after a colon."""
    return collections.Counter(one.status.partition(":")[0] for one in analysed)


def _report(path: Path, analysed: Sequence[Analysed]) -> None:
    """Prints the counts of each status, and writes them with a list of the excluded recordings."""
    reasons = _reasons(analysed)
    notes = collections.Counter(note for one in analysed for note in one.notes)
    left_out = {one.recording.id: one.status for one in analysed if one.status != "aligned"}
    report: dict[str, Any] = {"recordings": reasons, "notes": notes, "left_out": left_out}
    files.write_json(path, report)
    for name, count in (reasons + notes).most_common():
        print(f"{count} of {len(analysed)} recordings: {name}")
