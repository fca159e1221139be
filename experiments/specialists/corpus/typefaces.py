"""Finds the typefaces that have the characters."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fontTools.ttLib import TTFont, TTLibError, TTLibFileIsCollectionError
from fontTools.ttLib.ttCollection import TTCollection

from distill_jax.errors import UserError

LEAST = 0.9  # of the characters that a typeface must have


class Source(NamedTuple):
    """Where typefaces are from: a package, its version and licence, and the file that says so."""

    package: str
    version: str
    licence: str
    notice: Path


class Typeface(NamedTuple):
    """A face of a font file: its number in the file, and how many of the characters it has."""

    name: str
    source: Source
    path: Path
    number: int
    present: int


def find(folder: Path, characters: Sequence[str], source: Source) -> list[Typeface]:
    """The faces in a folder that have 90 % of the characters, by their files' names.

    Files of the same name in different folders are different typefaces.

    Args:
        folder: searched with all that is below it for TrueType and OpenType files and collections;
            links are passed over.
        characters: that faces are to be asked for.
        source: of all files in the folder; a face's name begins with the package's.

    Raises:
        UserError: for a font file that can't be read.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    fonts = sorted(path for path in files if path.suffix.lower() in (".ttf", ".otf", ".ttc"))
    names = collections.Counter(path.name for path in fonts)
    codes = [ord(character) for character in characters]
    found = []
    for path in fonts:
        known = _known_codes(path)
        for number, here in enumerate(known):
            present = sum(code in here for code in codes)
            if present >= LEAST * len(codes):
                suffix = f"#{number}" if len(known) > 1 else ""
                own = path.name if names[path.name] == 1 else path.relative_to(folder).as_posix()
                name = f"{source.package}/{own}{suffix}"
                found.append(Typeface(name, source, path, number, present))
    return found


def _known_codes(path: Path) -> list[set[int]]:
    """The Unicode codes that each face of a file has glyphs for."""
    try:
        try:
            faces = [TTFont(path, lazy=True)]
        except TTLibFileIsCollectionError:
            faces = list(TTCollection(path, lazy=True))
        return [set(face.getBestCmap() or ()) for face in faces]
    except (TTLibError, OSError, AssertionError, ValueError, KeyError) as error:
        raise UserError(f"{path} can't be read as a font: {error}") from error
