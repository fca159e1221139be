"""Prepared data sets: written by TFDS as ArrayRecord shards, read without TensorFlow.

A preparation has one folder for all its files: `work` while it is unfinished, then `NAME/1.0.0`.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax import files
from distill_jax.errors import UserError

_VERSION = "1.0.0"
_CLAIM = "work/set.json"


class Kind(NamedTuple):
    """A kind of set. embedded: the folder of the one in the project. command: prepares another one."""

    name: str
    description: str
    embedded: Path
    command: str


class Opened(NamedTuple):
    """A set on disk. info: TFDS's. sources: by split, random access to its records."""

    folder: Path
    info: Any
    sources: dict[str, Any]
    metadata: dict[str, Any]


def folder_of(kind: Kind, directory: Path) -> Path:
    """The folder that `write` makes; it exists only once the set is complete."""
    return directory / kind.name / _VERSION


def claim(kind: Kind, out: Path, mine: Mapping[str, Any]) -> Path:
    """Reserves a folder for a preparation, or checks that the one in it is the same.

    Args:
        kind: of the set.
        out: folder for all files.
        mine: JSON values that say which set is prepared.

    Returns:
        The folder for unfinished work.

    Raises:
        UserError: if `out` has a set, another one half prepared, or other files in that folder.
    """
    if folder_of(kind, out).exists():
        raise UserError(
            f"{folder_of(kind, out)} is a prepared set already: name another --out, or delete it"
        )
    path = out / _CLAIM
    if path.exists():
        what = f"{path.parent} holds another set half prepared"
        files.check_same(what, files.read_json(path), mine, "Name another --out, or delete it")
    else:
        files.check_own_folder(path.parent, (), "unfinished work")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, mine)
    return path.parent


def write(
    kind: Kind,
    directory: Path,
    features: Mapping[str, Any],
    splits: Mapping[str, Iterable[tuple[Any, Mapping[str, Any]]]],
    *,
    metadata: Mapping[str, Any],
) -> Path:
    """Writes a set as TFDS does.

    Args:
        kind: of the set.
        directory: TFDS's data_dir.
        features: TFDS's, by name.
        splits: by name, keys and records.
        metadata: stored in metadata.json of the set.

    Returns:
        The folder of the set; an existing one is not changed.
    """
    import tensorflow_datasets as tfds

    # TFDS would refuse a second class of this name in the process.
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = kind.name
            VERSION = tfds.core.Version(_VERSION)
            pkg_dir_path = kind.embedded.parent

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=kind.description,
                    features=tfds.features.FeaturesDict(features),
                    metadata=tfds.core.MetadataDict(metadata),
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                del dl_manager  # Nothing is downloaded.
                return {name: self._generate_examples(part) for name, part in splits.items()}

            def _generate_examples(self, part: Iterable[Any]) -> Iterator[Any]:
                yield from part

    for left_over in directory.glob(f"{kind.name}/incomplete.*_{_VERSION}"):
        shutil.rmtree(left_over)
    builder = Builder(data_dir=directory)
    builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
    return Path(builder.data_dir)


def open_set(kind: Kind, source: str | Path, splits: Sequence[str]) -> Opened:
    """Opens splits of a set.

    Args:
        kind: of the set.
        source: "embedded", or a folder that the preparation made (the set's own or a data_dir).
        splits: to open.

    Raises:
        UserError: if the folder has no such set, or an incomplete or damaged one.
    """
    folder = find_set(kind, source)
    import tensorflow_datasets as tfds

    with reading(f"{folder}: the set of {kind.name}"):
        json.loads((folder / "dataset_info.json").read_text())  # TFDS's own error is no ValueError
        builder = tfds.builder_from_directory(folder)
        if builder.name != kind.name:
            raise ValueError(f"it is a set of {builder.name}")
        sources = {name: builder.as_data_source(name) for name in splits}
        metadata = json.loads((folder / "metadata.json").read_text())
    return Opened(folder, builder.info, sources, metadata)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Raises a UserError that says what can't be read, for whatever TFDS or its files raise."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"{what} can't be read ({reason}); prepare the set again") from error


def find_set(kind: Kind, source: str | Path) -> Path:
    """The folder of a set: "embedded", its own folder, or a data_dir that it lies in.

    Raises:
        UserError: if none is there, with the command that prepares one.
    """
    folder = kind.embedded if source == "embedded" else files.local_path(source)
    for candidate in (folder, folder_of(kind, folder)):
        if (candidate / "dataset_info.json").exists():
            return candidate
    unfinished = any(folder.glob(f"{kind.name}/*incomplete*")) or (folder / _CLAIM).exists()
    hint = (
        "its preparation did not end: run the same command again"
        if unfinished
        else f"prepare one by: {kind.command} --out={folder}"
    )
    raise UserError(f"data.source: no prepared {kind.name} set in {folder}; {hint}")
