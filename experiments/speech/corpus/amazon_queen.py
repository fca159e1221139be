"""Flight of the Amazon Queen (Debian: flight-of-the-amazon-queen): its speech and subtitles.

`queen.1c` is one archive that begins with a table of its files. Subtitles lie in dialogues (.DOG), cut
scenes (.CUT) and the texts of the game's objects (.JAS); a rule of the game makes from the place of a
subtitle the name of the file with its speech (.SB), which are MP3 files here.
"""

import functools
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from distill_jax.errors import UserError
from experiments.speech.corpus.recordings import Audio, Recording, decode

# The speech's own sampling rate. The files claim 11,025 Hz, but the recordings are slower and lower
# than people speak then; of a range of rates, a recogniser made the fewest word errors at this one.
CLAIMED_RATE, TRUE_RATE = 11025, 11840  # Hz

_TABLE, _ENTRY = 15, ">12sxII"  # where the table begins; name, place and size of a file in it
_BANK_HEADER = 20  # bytes in front of a dialogue's, cut scene's or object file's content
_HERO = "JOE"
_HERO_LINES = 40  # remarks of the hero that belong to no object, numbered before those that do
_SCENE = 16  # remarks beside each other in the texts of objects

# A subtitle is cut into parts, each with its speech, by commands: "*XY" with a place in 11
# characters, or "*" with two.
_COMMAND = re.compile(r"\*(?:XY.{0,11}|.{0,2})", re.DOTALL)


class _Line(NamedTuple):
    prefix: str  # of the speech files' names; blanks stand for zeros
    speaker: str
    scene: str
    text: str


_Files = dict[str, tuple[int, int]]  # offset and size by name
_Load = Callable[[str], bytes]  # a file's content by name


def recordings(folder: str | os.PathLike[str]) -> list[Recording]:
    """Lists all subtitles that have speech.

    `speaker` is "queen_" and the hero ("JOE") or whom he talks with ("BOB", as the dialogue's file is
    called); "cut_" and a name for a cut scene, whose lines don't say who speaks. `scene` is the file, or
    16 of the texts of objects.

    Args:
        folder: with `queen.1c`.

    Raises:
        UserError: if that is missing, damaged or of another version.
    """
    path = Path(folder) / "queen.1c"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if content[:4] != b"QTBL":
        raise UserError(
            f"{path}: not an archive of Flight of the Amazon Queen, which begins with QTBL"
        )
    try:
        found = _recordings(path, content, _files(content))
    except (IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise UserError(f"{path}: damaged ({error!r})") from error
    if not found:
        raise UserError(f"{path}: no speech; expected the talking version")
    return found


def _files(content: bytes) -> _Files:
    (count,) = struct.unpack_from(">H", content, _TABLE - 2)
    size = struct.calcsize(_ENTRY)
    entries = (struct.unpack_from(_ENTRY, content, _TABLE + size * i) for i in range(count))
    return {name.split(b"\0")[0].decode("ascii"): (at, size) for name, at, size in entries}


def _recordings(path: Path, content: bytes, files: _Files) -> list[Recording]:
    def load(name: str) -> bytes:
        offset, size = files[name]
        return content[offset : offset + size]

    found: dict[str, Recording] = {}
    for line in _lines(files, load):
        for number, part in enumerate(_COMMAND.split(line.text), start=1):
            name = f"{line.prefix}{number:x}".replace(" ", "0").upper()
            text = part.strip()
            # Some lines are listed twice under one name; the speech is that of the first.
            if text and f"{name}.SB" in files and name not in found:
                read = functools.partial(_read, str(path), name, *files[f"{name}.SB"])
                found[name] = Recording(
                    f"queen_{name}",
                    f"queen_{line.speaker}",
                    f"queen_{line.scene}",
                    split="",
                    text=text,
                    read=read,
                )
    return list(found.values())


def _lines(files: _Files, load: _Load) -> Iterator[_Line]:
    for name in files:
        if name.endswith(".DOG"):
            yield from _dialogue(name, load(name)[_BANK_HEADER:])
        elif name.endswith(".CUT"):
            yield from _cut_scene(name, load(name)[_BANK_HEADER:])
    if "QUEEN.JAS" in files:
        yield from _object_texts(load("QUEEN.JAS")[_BANK_HEADER:], load("QUEEN2.JAS"))


def _dialogue(name: str, content: bytes) -> Iterator[_Line]:
    """The hero's choices, the answers to them, and the lines at the dialogue's beginning and end.

    A header of numbers, then a table of `levels` rows of the talk's course, then the texts.
    """
    levels, _, key, hero_count, answer_count = struct.unpack_from(">5h", content)
    answers_at, _, last_at = struct.unpack_from(">3H", content, 22)
    hero_at = 32 + 96 * abs(levels)
    person = re.sub(r"\d+$", "", name.removesuffix(".DOG"))
    for number, text in _numbered_texts(content, hero_at, hero_count):
        yield _Line(f"{key:2d}{number:4x}J", _HERO, name, text)
    for number, text in _numbered_texts(content, answers_at, answer_count):
        yield _Line(f"{key:2d}{number:4x}P", person, name, text)
    (first_number,) = struct.unpack_from(">H", content, hero_at + 2)
    if not first_number:
        yield _Line(f"{key:2d}SSSSJ", _HERO, name, _text(content, hero_at + 4)[0])
    answer, after = _text(content, last_at)
    yield _Line(f"{key:2d}XXXXP", person, name, answer)
    yield _Line(f"{key:2d}XXXXJ", _HERO, name, _text(content, after)[0])


def _numbered_texts(content: bytes, at: int, count: int) -> Iterator[tuple[int, str]]:
    for _ in range(count):
        (number,) = struct.unpack_from(">2xH", content, at)
        text, at = _text(content, at + 4, alignment=4)
        yield number, text


def _cut_scene(name: str, content: bytes) -> Iterator[_Line]:
    (count,) = struct.unpack_from(">h", content, 2)
    (at,) = struct.unpack_from(">H", content, 8)
    base = name.removesuffix(".CUT")
    _, at = _text(content, at)  # a song or an entry to the next room
    for number in range(1, abs(count) + 1):
        text, at = _text(content, at)
        if text != "*" and not text.startswith("#"):  # no text, or one that is shown only
            yield _Line(f"{base:_<5}{number:02d}", f"cut_{base}", name, text)


def _object_texts(counts: bytes, texts: bytes) -> Iterator[_Line]:
    """The hero's remarks, a text a line: descriptions first, then names of things, then general ones."""
    rooms, names, _, descriptions = struct.unpack_from(">4H", counts)
    lines = texts.decode("latin-1").split("\n")
    general = descriptions + names + rooms + 12
    numbered = lines[general : general + _HERO_LINES] + lines[:descriptions]
    for number, text in enumerate(numbered, start=1):
        yield _Line(f"{_HERO}{number:04d}", _HERO, f"JAS{number // _SCENE}", text)


def _text(content: bytes, at: int, alignment: int = 2) -> tuple[str, int]:
    """A text behind a byte with its length, and the place behind it; an empty one takes one byte."""
    length = content[at]
    end = at + 1 + length
    text = content[at + 1 : end].decode("latin-1")
    return text, end if not length else -(-end // alignment) * alignment


def _read(path: str, name: str, offset: int, size: int) -> Audio:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    what = f"{path}, {name}.SB"
    if len(content) != size:
        raise UserError(f"{what}: damaged, {len(content)} of {size} bytes are there")
    samples, rate = decode(content, what)
    return samples, TRUE_RATE if rate == CLAIMED_RATE else rate
