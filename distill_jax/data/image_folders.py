"""Image sets as folders of image files, one folder for each class.

FOLDER has train/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png alone, of which a share is held out.
The examples are in the order of a hash of their names, so that the first so many are of all classes.
"""

import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image, ImageOps

from distill_jax.data import records
from distill_jax.data.examples import (
    TEST_SPLITS,
    check_classes,
    check_share,
    draw_test,
    resize,
    say_once,
)
from distill_jax.data.records import OnDisk, Records
from distill_jax.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")
_SPLITS = {"train": ("train", "training"), "test": (*TEST_SPLITS, "testing", "valid")}
_GREY = ("1", "L", "LA", "F")  # modes of Pillow; and those of 16 and 32 bits, which begin with I
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # orientations that exchange height and width

File = tuple[Path, int]
"""An image and its label."""


class Folder(NamedTuple):
    """The files of a set, in order. others: files in it that are not read."""

    name: str
    class_names: tuple[str, ...]
    train: list[File]
    test: list[File]
    others: list[Path]


class _Kind(NamedTuple):
    """What an image's file says before it is decoded; size: height and width, as it is shown."""

    grey: bool
    size: tuple[int, int]


def find(folder: Path, test_share: float = 0.0, seed: int = 0) -> Folder:
    """Finds the files of a set, and reads none; arguments and errors as `images.load`."""
    name = f"images:{folder}"
    if not folder.is_dir():
        raise UserError(f"{name}: there is no such folder")
    parts, others = _parts(folder), list[Path]()
    root = parts.get("train", folder)
    named = {path.name.lower() for path in _folders(folder)}
    if root == folder and all(named & set(names) for names in _SPLITS.values()):
        raise UserError(
            f"{name}: the folder of training images has no folders in it; each class has a folder with "
            "its images"
        )
    classes = _classes(root, others)
    names = tuple(sorted(classes))
    check_classes(len(names), name)
    train = _ordered(classes, names, root)
    check_share(test_share, "test" in parts, name)
    if "test" not in parts:
        drawn = draw_test(np.array([label for _, label in train]), test_share, seed, name)
        kept, test = (list(itertools.compress(train, mask)) for mask in (~drawn, drawn))
        return Folder(name, names, kept, test, others)
    classes = _classes(parts["test"], others)
    unknown = sorted(set(classes) - set(names))
    if unknown:
        raise UserError(f"{parts['test'] / unknown[0]}: train has no class {unknown[0]!r}")
    return Folder(name, names, train, _ordered(classes, names, parts["test"]), others)


def open_set(folder: Folder, side: int = 0) -> OnDisk:
    """Opens a set: of each image its kind is read, and not yet its pixels; as `images.load`."""
    if folder.others:
        say_once(
            f"{folder.name}: {len(folder.others)} other files are not read, the first is "
            f"{folder.others[0]}; images are {', '.join(_SUFFIXES)} in the folders of classes"
        )
    colour = _is_colour([path for path, _ in folder.train + folder.test], side, folder.name)
    classes = len(folder.class_names)
    train = _records(folder.train, colour, side, classes, name=f"{folder.name}, train", first_id=0)
    test = _records(
        folder.test, colour, side, classes, name=f"{folder.name}, test", first_id=train.size
    )
    return OnDisk(folder.name, classes, train, test, folder.class_names)


def _records(
    part: Sequence[File], colour: bool, side: int, num_classes: int, *, name: str, first_id: int
) -> Records:
    return records.make(
        lambda numbers: [(part[number][0].read_bytes(), part[number][1]) for number in numbers],
        len(part),
        lambda file: {"inputs": _decode(file[0], colour, side), "label": np.int32(file[1])},
        num_classes,
        where=lambda number: str(part[number][0]),
        name=name,
        first_id=first_id,
    )


def _parts(folder: Path) -> dict[str, Path]:
    """The folders "train" and "test", by whatever name, that have folders in them."""
    there = {path.name.lower(): path for path in _folders(folder)}
    found = {
        split: [there[name] for name in names if name in there and _folders(there[name])]
        for split, names in _SPLITS.items()
    }
    return {split: paths[0] for split, paths in found.items() if paths}


def _folders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if entry.is_dir()]


def _classes(folder: Path, others: list[Path]) -> dict[str, list[Path]]:
    """The images of each class, also those in folders within its own; adds other files to `others`."""
    others += [Path(entry.path) for entry in _entries(folder) if entry.is_file()]
    found: dict[str, list[Path]] = {}
    for inner in _folders(folder):
        files = list(_files(inner))
        found[inner.name] = [path for path in files if path.suffix.lower() in _SUFFIXES]
        others += [path for path in files if path.suffix.lower() not in _SUFFIXES]
        if not found[inner.name]:
            raise UserError(f"{inner}: a class without images ({', '.join(_SUFFIXES)})")
    if not found:
        raise UserError(f"{folder}: no folders in it; each class has a folder with its images")
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, in the order of names, but for what is hidden."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} can't be read: {error.strerror}") from error


def _files(folder: Path) -> Iterator[Path]:
    read = set[str]()
    for at, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        if os.path.realpath(at) in read:
            raise UserError(f"{at} links to a folder that is in {folder} already")
        read.add(os.path.realpath(at))
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (Path(at, name) for name in names if name[0] != ".")


def _ordered(classes: dict[str, list[Path]], names: Sequence[str], root: Path) -> list[File]:
    files = [(path, names.index(name)) for name, paths in classes.items() for path in paths]
    return sorted(files, key=lambda file: _hash(file[0].relative_to(root)))


def _hash(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode(errors="surrogateescape")).digest()


def _is_colour(paths: Sequence[Path], side: int, name: str) -> bool:
    """Whether any image is coloured; a UserError if their sizes differ and they are not resized."""
    kinds = [
        _read_kind(path)
        for path in records.watched(paths, len(paths), 1, f"{name}: kinds of images read")
    ]
    for path, kind in zip(paths, kinds, strict=True):
        if kind.size != kinds[0].size and not side:
            raise UserError(
                f"{name}: images differ in size: {paths[0]} is {list(kinds[0].size)}, {path} is "
                f"{list(kind.size)}; data.side is the size to which they can be resized"
            )
    return not all(kind.grey for kind in kinds)


def _read_kind(path: Path) -> _Kind:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            size = image.size if _orientation(image) in _TURNED else image.size[::-1]
            return _Kind(image.mode in _GREY or image.mode.startswith("I"), size)
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{path} can't be read as PNG or JPEG ({error})") from error


def _orientation(image: Image.Image) -> int:
    # Pillow would decode a whole PNG for tags that may stand at its end: those aren't looked at.
    return image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1


def _decode(content: bytes, colour: bool, side: int) -> np.ndarray:
    """The image of a file as uint8 `[H, W]` or `[H, W, 3]`, as a white page shows it.

    Of 16 bits the upper eight are kept. What is transparent shows white. EXIF's orientation is applied.
    """
    with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
        image = ImageOps.exif_transpose(opened) if _orientation(opened) != 1 else opened
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            page = Image.new("RGBA", image.size, "white")
            page.alpha_composite(image.convert("RGBA"))
            image = page.convert("RGB")
        pixels = np.asarray(image.convert("RGB" if colour else "L"))
    if not side:
        return pixels
    resized = resize(pixels, side)
    return resized if colour else resized[..., 0]
