"""The data set `glyphs`: characters as many typefaces draw them, written and read by TFDS without
TensorFlow.

One record has all characters of one typeface in one split, compressed together: of the embedded set,
12 MB that are read in 0.3 s. A PNG per record would be 27 MB, read in 11 s.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import prepared

SPLITS = ("train", "seen", "validation", "test")
SIZE = 32  # pixels
KIND = prepared.Kind(
    "glyphs",
    "Han characters as many typefaces draw them, a record per typeface.",
    Path(__file__).with_name("embedded"),
    "python -m experiments.specialists.prepare",
)
_FORMAT = 1


class Sheet(NamedTuple):
    """n characters of one typeface: its number, int labels `[n]`, uint8 images `[n, 32, 32]`."""

    typeface: int
    labels: np.ndarray
    images: np.ndarray


class Glyphs(NamedTuple):
    """A prepared set of C characters.

    characters: the C classes, by label. typefaces: of each its "name", "package", "version" and
    "licence", the "group" of similar ones that it is in, and the "split": train, validation or test.

    splits: "train"; "seen", other characters of the same typefaces; "validation" and "test", groups
    of typefaces of their own. Each has int32 "id" `[n]`, in order, of which no two in the set are
    equal (typeface * C + label), uint8 "inputs" `[n, 32, 32]`, white on black, int32 "label" `[n]` and
    int32 "typeface" `[n]`.

    metadata: how the set was made. fingerprint: 16 hex digits, a hash of the whole content.
    """

    characters: tuple[str, ...]
    typefaces: tuple[dict[str, Any], ...]
    splits: dict[str, dict[str, np.ndarray]]
    metadata: dict[str, Any]
    fingerprint: str


def write(
    directory: Path,
    characters: Sequence[str],
    typefaces: Sequence[Mapping[str, Any]],
    splits: Mapping[str, Iterable[Sheet]],
    metadata: Mapping[str, Any],
) -> Path:
    """Writes the set as TFDS does, in the folder `directory/glyphs/1.0.0`.

    Args:
        directory: TFDS's data_dir.
        characters: the classes.
        typefaces: as in `Glyphs`.
        splits: by name, at most one sheet per typeface.
        metadata: stored in metadata.json of the set.

    Returns:
        The folder of the set; an existing one is not changed.
    """
    import tensorflow_datasets as tfds

    names = [typeface["name"] for typeface in typefaces]
    features = {
        "typeface": tfds.features.ClassLabel(names=names),
        "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=list(characters))),
        "images": tfds.features.Tensor(
            shape=(None, SIZE, SIZE), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB
        ),
    }
    records = {
        name: ((sheet.typeface, sheet._asdict()) for sheet in sheets)
        for name, sheets in splits.items()
    }
    metadata = {**metadata, "format": _FORMAT, "typefaces": list(typefaces)}
    return prepared.write(KIND, directory, features, records, metadata=metadata)


def load(source: str | Path = "embedded") -> Glyphs:
    """Reads a prepared set into memory.

    Args:
        source: "embedded", or a folder that the preparation made (the set's own or a data_dir).

    Raises:
        UserError: if the folder has no such set, or an incomplete or damaged one.
    """
    folder, info, sources, metadata = prepared.open_set(KIND, source, SPLITS)
    with prepared.reading(f"{folder}: the set of glyphs"):
        if metadata["format"] != _FORMAT:
            raise ValueError(f"it has format {metadata['format']}; this program reads {_FORMAT}")
        characters = tuple(info.features["labels"].feature.names)
        typefaces = tuple(metadata.pop("typefaces"))
    splits = {}
    for name, records in sources.items():
        with prepared.reading(f"{folder}: split {name}"):
            sheets = [Sheet(int(r["typeface"]), r["labels"], r["images"]) for r in records]
            splits[name] = _examples(sheets, len(characters))
    return Glyphs(
        characters, typefaces, splits, metadata, _fingerprint(characters, typefaces, splits)
    )


def _examples(sheets: Sequence[Sheet], classes: int) -> dict[str, np.ndarray]:
    """A split's arrays, in the order of the ids; TFDS's own order is by hash."""
    sheets = sorted(sheets, key=lambda sheet: sheet.typeface)
    label = np.concatenate([sheet.labels for sheet in sheets]).astype(np.int32)
    sizes = [len(sheet.labels) for sheet in sheets]
    typeface = np.repeat(np.array([sheet.typeface for sheet in sheets], np.int32), sizes)
    image = np.concatenate([sheet.images for sheet in sheets])
    return {
        "id": typeface * np.int32(classes) + label,
        "inputs": image,
        "label": label,
        "typeface": typeface,
    }


def _fingerprint(
    characters: Sequence[str],
    typefaces: Sequence[Mapping[str, Any]],
    splits: Mapping[str, Mapping[str, np.ndarray]],
) -> str:
    digest = hashlib.sha256(json.dumps([characters, typefaces], sort_keys=True).encode())
    for name, part in splits.items():
        digest.update(name.encode() + part["id"].tobytes() + part["inputs"].tobytes())
    return digest.hexdigest()[:16]
