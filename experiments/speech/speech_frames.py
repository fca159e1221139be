"""The data set `speech_frames`: aligned utterances as TFDS ArrayRecord shards, written and read without
TensorFlow.

An utterance is quantised log-mel frames with the tied HMM state (senone) of each; what turns them back
into log-mel energies, and where the states come from, is in the set's metadata.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import UserError

SPLITS = ("train", "validation", "test")
NUM_MELS = 40
EMBEDDED = Path(__file__).with_name("embedded")
_VERSION = "1.0.0"


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
    builder = _make_builder(directory, splits, metadata)
    import tensorflow_datasets as tfds

    builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
    return Path(builder.data_dir)


def load(source: str, splits: tuple[str, ...] = SPLITS, on_disk: tuple[str, ...] = ()) -> Corpus:
    """Reads splits of a prepared set into memory.

    Args:
        source: "embedded", or a folder that the preparation made (the set's own or a data_dir).
        splits: to read.
        on_disk: splits that are opened as `Records` and not read into memory.

    Raises:
        UserError: if the folder has no such set, or an incomplete or damaged one.
    """
    folder = find(source)
    sources, metadata = open_sources(folder, splits)
    read: dict[str, Sequence[Utterance]] = {}
    for name, opened in sources.items():
        records = Records(opened, range(len(opened)))
        try:
            read[name] = records if name in on_disk else list(records)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"{folder}: split {name} cannot be read ({error}); prepare the set again"
            ) from error
    return Corpus(source, read, metadata)


def folder_of(directory: Path) -> Path:
    """The folder that `write` makes; it exists only once the set is complete."""
    return directory / "speech_frames" / _VERSION


def find(source: str) -> Path:
    """The folder of a set: "embedded", its own folder, or a data_dir that it lies in."""
    folder = EMBEDDED if source == "embedded" else Path(source)
    for candidate in (folder, folder_of(folder)):
        if (candidate / "dataset_info.json").exists():
            return candidate
    partial = (
        list(folder.glob("speech_frames/*incomplete*")) or (folder / "work/corpus.json").exists()
    )
    hint = (
        "its preparation did not end: run the same command again"
        if partial
        else (
            "prepare one by: python -m experiments.speech.prepare --corpus=... --out=" + str(folder)
        )
    )
    raise UserError(f"data.source: no prepared speech_frames set in {folder}; {hint}")


def open_sources(folder: Path, splits: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random access to the splits' records (`utterance` decodes one), and the metadata."""
    import tensorflow_datasets as tfds

    try:
        json.loads((folder / "dataset_info.json").read_text())  # TFDS's own error is no ValueError
        builder = tfds.builder_from_directory(folder)
        sources = {name: builder.as_data_source(name) for name in splits}
        metadata = json.loads((folder / "metadata.json").read_text())
    except (ValueError, KeyError, OSError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"{folder} is no readable speech_frames set: {reason}") from error
    return sources, metadata


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


def _make_builder(
    directory: Path,
    splits: Mapping[str, Callable[[], Iterator[Utterance]]],
    metadata: Mapping[str, Any],
) -> Any:
    import tensorflow_datasets as tfds

    zlib = tfds.features.Encoding.ZLIB

    # TFDS would refuse a second class of this name in the process.
    with tfds.core.registered.skip_registration():

        class SpeechFrames(tfds.core.GeneratorBasedBuilder):
            """Recorded utterances with log-mel frames and the tied HMM state of each."""

            name = "speech_frames"
            VERSION = tfds.core.Version(_VERSION)
            pkg_dir_path = Path(__file__).parent

            def _info(self) -> Any:
                tensor = tfds.features.Tensor
                features = {
                    "id": tfds.features.Text(),
                    "speaker": tfds.features.Text(),
                    "words": tfds.features.Text(),
                    "frames": tensor(shape=(None, NUM_MELS), dtype=np.uint8, encoding=zlib),
                    "states": tensor(shape=(None,), dtype=np.int32, encoding=zlib),
                    "segments": tfds.features.Text(),
                    "starts": tensor(shape=(None,), dtype=np.int32, encoding=zlib),
                    "audio": tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=self.__doc__,
                    features=tfds.features.FeaturesDict(features),
                    metadata=tfds.core.MetadataDict(metadata),
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                del dl_manager  # Nothing is downloaded.
                return {name: self._generate_examples(make()) for name, make in splits.items()}

            def _generate_examples(self, utterances: Iterator[Utterance]) -> Iterator[Any]:
                for one in utterances:
                    yield (
                        one.id,
                        {
                            **one._asdict(),
                            "words": " ".join(one.words),
                            "segments": " ".join(one.segments),
                            "audio": np.frombuffer(one.audio, np.uint8),
                        },
                    )

    return SpeechFrames(data_dir=directory)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
