"""From typefaces to a prepared set: draw, group, split, write.

The output folder has:

    work/               the drawn characters of every typeface, until the set is written
    licences/           the copyright file of every package that has a part in the set
    report.json         the status of every typeface
    glyphs/             the set
"""

import shutil
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax import files
from distill_jax.errors import UserError
from experiments.common import prepared, workers
from experiments.specialists import glyphs
from experiments.specialists.corpus import grouping, rendering
from experiments.specialists.corpus.typefaces import LEAST, Typeface
from experiments.specialists.glyphs import Sheet

_SAMPLE = 80  # characters that typefaces are compared on
_NEAR_COPY, _GROUP = 0.05, 0.15  # distances
_HELD_OUT = {"test": 0.2, "validation": 0.1}  # of the typefaces
_SEEN = 0.1  # of the examples of typefaces in train

Rendered = tuple[np.ndarray, np.ndarray]  # uint8 [C, 32, 32] and bool [C], as `rendering.render`


def prepare(
    faces: Sequence[Typeface], characters: Sequence[str], out: Path, processes: int = 0
) -> Path:
    """Prepares a set, or continues one.

    Of typefaces that are near copies of each other, one is kept. Similar ones are in the same split,
    so that validation and test have kinds of typefaces that training does not have.

    Args:
        faces: that may be near copies of each other.
        characters: C of them, the classes.
        out: folder for all files.
        processes: number of parallel processes; 0 for one per core.

    Returns:
        The folder of the set.

    Raises:
        UserError: for a folder that holds a set, or another one half prepared; for too few kinds of
            typefaces to split.
    """
    work = _claim(out, faces, characters)
    sample = characters[:: max(1, len(characters) // _SAMPLE)][:_SAMPLE]
    sampled = _render_all(faces, sample, work / "samples", processes)
    able = [number for number, (_, drawn) in enumerate(sampled) if drawn.mean() >= LEAST]
    if not able:
        raise UserError(f"none of {len(faces)} typefaces draws the characters")
    chosen, group = _choose([faces[n] for n in able], [sampled[n] for n in able])
    split = grouping.hold_out(group, [face.name for face in chosen], _HELD_OUT, "train")
    rendered = _render_all(chosen, characters, work / "glyphs", processes)
    sheets = _sheets(chosen, split, rendered, characters)
    counts = {
        "typefaces found": len(faces),
        "that don't draw the characters": len(faces) - len(able),
        "near copies of another": len(able) - len(chosen),
        "typefaces kept": len(chosen),
        "groups of similar ones": len(set(group)),
        "blank glyphs left out": sum(int(np.sum(~drawn)) for _, drawn in rendered),
        **{f"typefaces of {name}": split.count(name) for name in ("train", *_HELD_OUT)},
        **{f"examples of {name}": sum(len(s.labels) for s in sheets[name]) for name in sheets},
    }
    files.write_json(out / "report.json", _report(counts, faces, chosen, rendered, characters))
    _copy_notices(chosen, out / "licences")
    metadata = {"distances": {"near copy": _NEAR_COPY, "group": _GROUP}, "counts": counts}
    folder = glyphs.write(out, characters, _about(chosen, group, split), sheets, metadata)
    for name, count in counts.items():
        print(f"{name}: {count}")
    shutil.rmtree(work)
    return folder


def _claim(out: Path, faces: Sequence[Typeface], characters: Sequence[str]) -> Path:
    """The folder for the unfinished work on this set alone."""
    mine = {
        "characters": "".join(characters),
        "typefaces": {face.name: face.source.version for face in faces},
    }
    return prepared.claim(glyphs.KIND, out, mine)


def _render_all(
    faces: Sequence[Typeface], characters: Sequence[str], folder: Path, processes: int
) -> list[Rendered]:
    """Draws the faces that no earlier run has, in parallel, with progress; the result by face."""
    folder.mkdir(exist_ok=True)
    # Quoted, so that no two names become one.
    paths = [folder / f"{urllib.parse.quote(face.name, safe='')}.npz" for face in faces]
    tasks = [
        (path, face.path, face.number, characters)
        for path, face in zip(paths, faces, strict=True)
        if not path.exists()
    ]
    if len(tasks) < len(paths):
        print(f"{len(paths) - len(tasks)} of {len(paths)} typefaces were drawn before")
    workers.run_all(_render, tasks, processes, "drew", f"typefaces in {len(characters)} characters")
    return [_read(path) for path in paths]


def _render(task: tuple[Path, Path, int, Sequence[str]]) -> None:
    """Draws a face in a worker and writes it to a file atomically."""
    path, font, number, characters = task
    images, drawn = rendering.render(font, number, characters)
    # A worker of a killed run may still write the same face, so each has its own partial file.
    with files.write_whole(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, images=images, drawn=drawn)


def _read(path: Path) -> Rendered:
    with np.load(path) as stored:
        return stored["images"], stored["drawn"]


def _choose(
    faces: Sequence[Typeface], sampled: Sequence[Rendered]
) -> tuple[list[Typeface], list[int]]:
    """One face of each set of near copies, that with most of the characters; and its group."""
    images, drawn = (np.stack(arrays) for arrays in zip(*sampled, strict=True))
    apart = grouping.distances(images, drawn)
    copies, groups = grouping.groups(apart, _NEAR_COPY), grouping.groups(apart, _GROUP)
    best: dict[int, int] = {}
    for number, face in enumerate(faces):
        other = best.setdefault(int(copies[number]), number)
        if face.present > faces[other].present:
            best[int(copies[number])] = number
    kept = sorted(best.values())
    return [faces[number] for number in kept], [int(groups[number]) for number in kept]


def _sheets(
    faces: Sequence[Typeface],
    split: Sequence[str],
    rendered: Sequence[Rendered],
    characters: Sequence[str],
) -> dict[str, list[Sheet]]:
    """The splits: whole faces, except that a tenth of the training examples, by hash, is `seen`."""
    sheets: dict[str, list[Sheet]] = {name: [] for name in glyphs.SPLITS}
    for number, (face, name, (images, drawn)) in enumerate(
        zip(faces, split, rendered, strict=True)
    ):
        places = [grouping.fraction("seen", face.name, character) for character in characters]
        seen = np.array([name == "train" and place < _SEEN for place in places])
        for part, chosen in ((name, drawn & ~seen), ("seen", drawn & seen)):
            if chosen.any():
                sheets[part].append(Sheet(number, np.flatnonzero(chosen), images[chosen]))
    return sheets


def _about(
    faces: Sequence[Typeface], group: Sequence[int], split: Sequence[str]
) -> list[dict[str, Any]]:
    """The metadata of the faces in the set."""
    return [
        {
            "name": face.name,
            "package": face.source.package,
            "version": face.source.version,
            "licence": face.source.licence,
            "group": number,
            "split": name,
        }
        for face, number, name in zip(faces, group, split, strict=True)
    ]


def _report(
    counts: Mapping[str, int],
    found: Sequence[Typeface],
    kept: Sequence[Typeface],
    rendered: Sequence[Rendered],
    characters: Sequence[str],
) -> dict[str, Any]:
    """The counts, the faces that were left out, and the characters that those kept don't have."""
    blank = {
        face.name: "".join(c for c, here in zip(characters, drawn, strict=True) if not here)
        for face, (_, drawn) in zip(kept, rendered, strict=True)
    }
    return {
        **counts,
        "left out": sorted({face.name for face in found} - {face.name for face in kept}),
        "blank": {name: missing for name, missing in blank.items() if missing},
    }


def _copy_notices(faces: Sequence[Typeface], folder: Path) -> None:
    for face in faces:
        place = folder / face.source.package
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(face.source.notice, place / "copyright")
