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

from distill_jax.errors import UserError

SPLITS = ("train", "seen", "validation", "test")
SIZE = 32  # pixels
EMBEDDED = Path(__file__).with_name("embedded")
_VERSION = "1.0.0"
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

    metadata = {**metadata, "format": _FORMAT, "typefaces": list(typefaces)}
    builder = _make_builder(directory, characters, splits, metadata)
    builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
    return Path(builder.data_dir)


def folder_of(directory: Path) -> Path:
    """The folder that `write` makes; it exists only once the set is complete."""
    return directory / "glyphs" / _VERSION


def load(source: str | Path = "embedded") -> Glyphs:
    """Reads a prepared set into memory.

    Args:
        source: "embedded", or a folder that the preparation made (the set's own or a data_dir).

    Raises:
        UserError: if the folder has no such set, or an incomplete or damaged one.
    """
    folder = _find(source)
    import tensorflow_datasets as tfds

    try:
        json.loads((folder / "dataset_info.json").read_text())  # TFDS's own error is no ValueError
        builder = tfds.builder_from_directory(folder)
        metadata = json.loads((folder / "metadata.json").read_text())
        if builder.name != "glyphs" or metadata["format"] != _FORMAT:
            raise ValueError(f"{builder.name}, format {metadata['format']}, not glyphs, {_FORMAT}")
        characters = tuple(builder.info.features["labels"].feature.names)
        typefaces = tuple(metadata.pop("typefaces"))
        sources = {name: builder.as_data_source(name) for name in SPLITS}
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"{folder} is no readable glyphs set: {reason}") from error
    splits = {}
    for name, records in sources.items():
        try:
            sheets = [Sheet(int(r["typeface"]), r["labels"], r["images"]) for r in records]
            splits[name] = _examples(sheets, len(characters))
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"{folder}: split {name} cannot be read ({error}); prepare the set again"
            ) from error
    return Glyphs(
        characters, typefaces, splits, metadata, _fingerprint(characters, typefaces, splits)
    )


def _find(source: str | Path) -> Path:
    """The folder of a set: "embedded", its own folder, or a data_dir that it lies in."""
    folder = EMBEDDED if source == "embedded" else Path(source)
    for candidate in (folder, folder_of(folder)):
        if (candidate / "dataset_info.json").exists():
            return candidate
    partial = any(folder.glob("glyphs/*incomplete*")) or (folder / "work/set.json").exists()
    hint = (
        "its preparation did not end: run the same command again"
        if partial
        else f"prepare one by: python -m experiments.specialists.prepare --out={folder}"
    )
    raise UserError(f"data.source: no prepared glyphs set in {folder}; {hint}")


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


def _make_builder(
    directory: Path,
    characters: Sequence[str],
    splits: Mapping[str, Iterable[Sheet]],
    metadata: Mapping[str, Any],
) -> Any:
    import tensorflow_datasets as tfds

    # TFDS would refuse a second class of this name in the process.
    with tfds.core.registered.skip_registration():

        class Glyphs(tfds.core.GeneratorBasedBuilder):
            """Han characters as many typefaces draw them, a record per typeface."""

            name = "glyphs"
            VERSION = tfds.core.Version(_VERSION)
            pkg_dir_path = Path(__file__).parent

            def _info(self) -> Any:
                names = [typeface["name"] for typeface in metadata["typefaces"]]
                features = {
                    "typeface": tfds.features.ClassLabel(names=names),
                    "labels": tfds.features.Sequence(
                        tfds.features.ClassLabel(names=list(characters))
                    ),
                    "images": tfds.features.Tensor(
                        shape=(None, SIZE, SIZE),
                        dtype=np.uint8,
                        encoding=tfds.features.Encoding.ZLIB,
                    ),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=self.__doc__,
                    features=tfds.features.FeaturesDict(features),
                    metadata=tfds.core.MetadataDict(metadata),
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                del dl_manager  # Nothing is downloaded.
                return {name: self._generate_examples(part) for name, part in splits.items()}

            def _generate_examples(self, sheets: Iterable[Sheet]) -> Any:
                for sheet in sheets:
                    yield sheet.typeface, sheet._asdict()

    return Glyphs(data_dir=directory)
