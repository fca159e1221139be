"""A corpus of the user's own: a file of JSON lines that names audio files and their transcripts."""

import collections
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.errors import UserError
from experiments.speech.corpus.recordings import Recording, read_file

SPLITS = ("", "train", "validation", "test")
_REQUIRED, _OPTIONAL = ("audio", "text"), ("id", "speaker", "scene", "split")


def recordings(path: str | os.PathLike[str]) -> list[Recording]:
    """Reads a manifest: one JSON object a line, empty lines between them are allowed.

    Keys: "audio", a file in a format of libsndfile, relative to the manifest's folder; "text", its
    transcript; optionally "id" (the audio file's name without its ending, or where several files have
    that name, "audio" itself), "speaker" (""), "scene" (""; recordings of one scene stay in one split)
    and "split" ("train", "validation", "test" or "").
    Further keys are ignored.

    Raises:
        UserError: with file and line, for bad JSON, a missing key, a value that isn't a string, a
            missing audio file, an unknown split or a repeated id; or if there are no recordings.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no readable manifest {path}: {error}") from error
    entries = {
        number: _entry(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    }
    if not entries:
        raise UserError(f"{path}: no recordings; expected one JSON object a line")
    names = collections.Counter(_name(entry) for entry in entries.values())
    found: list[Recording] = []
    lines_of_ids: dict[str, int] = {}
    for number, entry in entries.items():
        where, name = f"{path}, line {number}", _name(entry)
        id = name if "id" in entry or names[name] == 1 else entry["audio"]
        found.append(_recording(entry, id, path.parent, where))
        first = lines_of_ids.setdefault(id, number)
        if first != number:
            raise UserError(f"{where}: id {id!r} is also that of line {first}")
    return found


def _name(entry: Mapping[str, str]) -> str:
    return entry.get("id", Path(entry["audio"]).stem)


def _recording(entry: Mapping[str, str], id: str, folder: Path, where: str) -> Recording:
    audio = folder / entry["audio"]
    if not audio.is_file():
        raise UserError(f"{where}: no audio file {audio}")
    split = entry.get("split", "")
    if split not in SPLITS:
        listed = ", ".join(map(repr, SPLITS))
        raise UserError(f"{where}: split {split!r} is none of {listed}")
    return Recording(
        id=id,
        speaker=entry.get("speaker", ""),
        scene=entry.get("scene", ""),
        split=split,
        text=entry["text"],
        read=functools.partial(read_file, str(audio)),
    )


def _entry(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(entry).__name__}")
    missing = [key for key in _REQUIRED if key not in entry]
    if missing:
        raise UserError(f"{where}: {' and '.join(missing)} missing; found {sorted(entry)}")
    for key in _REQUIRED + _OPTIONAL:
        if not isinstance(entry.get(key, ""), str):
            raise UserError(f"{where}: {key} must be a string, found {entry[key]!r}")
    return entry
