"""LibriSpeech, from its own folders or from what TensorFlow Datasets (TFDS) prepared of it.

TFDS's own reader can't be used for sets with audio: making its `Audio` feature needs TensorFlow, even to
read what was decoded when the set was prepared. On disk such a feature is a plain list of integers, so
the records are read as that.

The parts of the corpus are splits by their names (train-clean-100, dev-other, ...), and no speaker is in
two of them.
"""

import functools
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.errors import UserError
from experiments.speech.corpus.recordings import RATE, Audio, Recording, read_file

_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def recordings(folder: str | os.PathLike[str]) -> list[Recording]:
    """Reads the layout of the corpus, PART/SPEAKER/CHAPTER/*.trans.txt with a FLAC file per line.

    Args:
        folder: with the parts ("LibriSpeech" in the published archives), any number of them.

    Returns:
        In the order of the paths; scenes are chapters of one speaker.

    Raises:
        UserError: for no transcripts, a part whose name isn't train-*, dev-* or test-*, or a
            transcript without its audio file.
    """
    transcripts = sorted(Path(folder).glob("*/*/*/*.trans.txt"))
    if not transcripts:
        raise UserError(f"no transcripts {folder}/PART/SPEAKER/CHAPTER/*.trans.txt")
    return [recording for path in transcripts for recording in _chapter(path)]


def _chapter(transcripts: Path) -> Iterator[Recording]:
    chapter = transcripts.parent
    speaker = chapter.parent
    split = _split(speaker.parent.name, str(speaker.parent), "-")
    for number, line in enumerate(transcripts.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, text = line.partition(" ")
        audio = chapter / f"{name}.flac"
        if not audio.is_file():
            raise UserError(f"{transcripts}, line {number}: no audio file {audio}")
        scene = f"{speaker.name}-{chapter.name}"
        read = functools.partial(read_file, str(audio))
        yield Recording(name, speaker.name, scene, split, text, read)


def tfds_recordings(name: str, data_dir: str | None = None) -> list[Recording]:
    """Reads a set that TFDS prepared in the format array_record; TensorFlow is not needed.

    Every example is decoded once for its transcript, which takes minutes for the whole corpus.

    Args:
        name: "librispeech[/CONFIG][:VERSION]", or another set with its features and splits.
        data_dir: TFDS's, None for its default ($TFDS_DATA_DIR or ~/tensorflow_datasets).

    Returns:
        Split after split in the order on disk; scenes are chapters of one speaker.

    Raises:
        UserError: for a set that is not there, is there in several versions, has another format,
            features or splits, or is damaged.
    """
    folder = _prepared_folder(name, data_dir)
    found: list[Recording] = []
    for part in _parts(folder, name):
        split = _split(part, f"{folder}, split {part}", "_")
        for index in range(len(_source(str(folder), part))):
            example = _example(str(folder), part, index)
            speaker = str(example["speaker_id"])
            found.append(
                Recording(
                    id=example["id"].decode(),
                    speaker=speaker,
                    scene=f"{speaker}-{example['chapter_id']}",
                    split=split,
                    text=example["text"].decode(),
                    read=functools.partial(_read, str(folder), part, index),
                )
            )
    return found


def _prepared_folder(name: str, data_dir: str | None) -> Path:
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    set_name, _, version = name.partition(":")
    folders = sorted(path.parent for path in (root / set_name).rglob("dataset_info.json"))
    folders = [folder for folder in folders if version in ("", folder.name)]
    if not folders:
        raise UserError(f"{name} is not prepared in {root}. Prepare it by: {_command(name, root)}")
    if len(folders) > 1:
        listed = ", ".join(str(folder.relative_to(root)) for folder in folders)
        raise UserError(f"{name} can be any of {listed} in {root}; name NAME/CONFIG:VERSION")
    return folders[0]


def _command(name: str, data_dir: Path) -> str:
    where = f"--data_dir={shlex.quote(str(data_dir))}"
    return f"pip install tensorflow && tfds build {name} {where} --file_format=array_record"


def _parts(folder: Path, name: str) -> list[str]:
    """The names of a prepared set's splits, all of whose files are there."""
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    if info.get("fileFormat") != "array_record":
        raise UserError(
            f"{folder} is prepared as {info.get('fileFormat')}, which has no random access. Delete it "
            f"and prepare it by: {_command(name, folder.parents[len(name.split('/'))])}"
        )
    for split in info["splits"]:
        found, expected = len(_shards(folder, split["name"])), len(split["shardLengths"])
        if found != expected:
            raise UserError(f"{folder}: {found} of {expected} files of split {split['name']}")
    return [split["name"] for split in info["splits"]]


def _shards(folder: Path, part: str) -> list[str]:
    return sorted(str(path) for path in folder.glob(f"*-{part}.array_record-*-of-*"))


# Opened once in each process: a recording carries the names only.
@functools.lru_cache(maxsize=32)
def _source(folder: str, part: str) -> Any:
    # Imported here, as TFDS is below, because the other readers don't need them.
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        return ArrayRecordDataSource(_shards(Path(folder), part))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{folder}, split {part}: cannot be read ({error})") from error


@functools.cache
def _features() -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "speech": tfds.features.Tensor(shape=(None,), dtype=np.int64),
            "text": tfds.features.Text(),
            "speaker_id": np.int64,
            "chapter_id": np.int64,
            "id": np.str_,
        }
    )


def _example(folder: str, part: str, index: int) -> dict[str, Any]:
    where = f"{folder}, split {part}, example {index}"
    try:
        example = _features().deserialize_example_np(_source(folder, part)[index])
    except (RuntimeError, OSError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from error
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{where}: not the features of librispeech ({error})") from error
    missing = [key for key, value in example.items() if value is None]
    if missing:
        raise UserError(f"{where}: not the features of librispeech, no {', '.join(missing)}")
    return example


def _read(folder: str, part: str, index: int) -> Audio:
    speech = _example(folder, part, index)["speech"]  # 16-bit samples
    return (speech / 32768).astype(np.float32), RATE


def _split(part: str, where: str, separator: str) -> str:
    kind = part.split(separator)[0]
    if kind not in _SPLITS:
        kinds = ", ".join(f"{kind}{separator}*" for kind in _SPLITS)
        raise UserError(f"{where}: a part of LibriSpeech is one of {kinds}")
    return _SPLITS[kind]
