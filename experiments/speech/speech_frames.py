"""The data set `speech_frames`: aligned utterances as TFDS ArrayRecord shards, written and read without
TensorFlow.

An utterance is quantised log-mel frames with the tied HMM state (senone) of each; what turns them back
into log-mel energies, and where the states come from, is in the set's metadata.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import prepared

SPLITS = ("train", "validation", "test")
NUM_MELS = 40
KIND = prepared.Kind(
    "speech_frames",
    "Recorded utterances with log-mel frames and the tied HMM state of each.",
    Path(__file__).with_name("embedded"),
    "python -m experiments.speech.prepare --corpus=debian",
)


class Utterance(NamedTuple):
    """One aligned recording of n frames, 10 ms each.

    frames: uint8 `[n, 40]`. states: int32 `[n]`, senones of the aligner's acoustic model. segments:
    words and silences as aligned, `starts` int32 `[len(segments)]` their first frames. audio: FLAC,
    16 kHz mono, empty where it was not kept.
    """

    id: str
    speaker: str
    words: tuple[str, ...]
    frames: np.ndarray
    states: np.ndarray
    segments: tuple[str, ...]
    starts: np.ndarray
    audio: bytes = b""

    def samples(self) -> np.ndarray:
        """The recording, int16 `[samples]` at 16 kHz."""
        import soundfile

        return soundfile.read(io.BytesIO(self.audio), dtype="int16")[0]


class Records(Sequence[Utterance]):
    """Utterances that are read from disk on access."""

    def __init__(self, source: Any, numbers: range):
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:  # noqa: D105
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:  # noqa: D105
        if isinstance(index, slice):
            return Records(self.source, self.numbers[index])
        return utterance(self.source[self.numbers[index]])


class Corpus(NamedTuple):
    """A prepared set.

    metadata: among others "mel_deviation" [40] and "byte" (zero, steps), which frames were quantised
    with; and by senone "phones" and "phone_states", the phone's own state that it is a variant of.
    "transcripts" are the words of training utterances that were left out for their number.
    """

    name: str
    splits: Mapping[str, Sequence[Utterance]]
    metadata: dict[str, Any]


def write(
    directory: Path,
    splits: Mapping[str, Callable[[], Iterator[Utterance]]],
    metadata: Mapping[str, Any],
) -> Path:
    """Writes the set as TFDS does, in the folder `directory/speech_frames/1.0.0`.

    Args:
        directory: TFDS's data_dir.
        splits: by name, a function that gives the utterances.
        metadata: stored in metadata.json of the set.

    Returns:
        The folder of the set; an existing one is not changed.
    """
    import tensorflow_datasets as tfds

    text, tensor, zlib = tfds.features.Text(), tfds.features.Tensor, tfds.features.Encoding.ZLIB
    features = {
        "id": text,
        "speaker": text,
        "words": text,
        "frames": tensor(shape=(None, NUM_MELS), dtype=np.uint8, encoding=zlib),
        "states": tensor(shape=(None,), dtype=np.int32, encoding=zlib),
        "segments": text,
        "starts": tensor(shape=(None,), dtype=np.int32, encoding=zlib),
        "audio": tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),
    }
    records = {name: map(_record, make()) for name, make in splits.items()}
    return prepared.write(KIND, directory, features, records, metadata=metadata)


def load(source: str, splits: tuple[str, ...] = SPLITS, on_disk: tuple[str, ...] = ()) -> Corpus:
    """Reads splits of a prepared set into memory.

    Args:
        source: "embedded", or a folder that the preparation made (the set's own or a data_dir).
        splits: to read.
        on_disk: splits that are opened as `Records` and not read into memory.

    Raises:
        UserError: if the folder has no such set, or an incomplete or damaged one.
    """
    opened = prepared.open_set(KIND, source, splits)
    read: dict[str, Sequence[Utterance]] = {}
    for name, records_on_disk in opened.sources.items():
        records = Records(records_on_disk, range(len(records_on_disk)))
        with prepared.reading(f"{opened.folder}: split {name}"):
            read[name] = records if name in on_disk else list(records)
    return Corpus(source, read, opened.metadata)


def utterance(record: Mapping[str, Any]) -> Utterance:
    """An utterance from a record of TFDS."""
    return Utterance(
        id=_text(record["id"]),
        speaker=_text(record["speaker"]),
        words=tuple(_text(record["words"]).split()),
        frames=record["frames"],
        states=record["states"],
        segments=tuple(_text(record["segments"]).split()),
        starts=record["starts"],
        audio=record["audio"].tobytes(),
    )


def alignment_fingerprint(corpus: Corpus, split: str) -> str:
    """16 hex digits, a hash of the ids and states of a split; soft targets belong to one."""
    digest = hashlib.sha256()
    for one in corpus.splits[split]:
        digest.update(one.id.encode() + b"\0" + np.ascontiguousarray(one.states).tobytes())
    return digest.hexdigest()[:16]


def _record(one: Utterance) -> tuple[str, dict[str, Any]]:
    """The inverse of `utterance`, with its key."""
    return one.id, {
        **one._asdict(),
        "words": " ".join(one.words),
        "segments": " ".join(one.segments),
        "audio": np.frombuffer(one.audio, np.uint8),
    }


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
