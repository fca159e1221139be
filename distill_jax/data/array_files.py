"""Image sets in files of whole arrays: the embedded MNIST, idx files like MNIST's, and npz files."""

import gzip
import hashlib
import re
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.data.examples import Source, with_ids
from distill_jax.errors import UserError

EMBEDDED_DIR = Path(__file__).parent / "mnist"

# SHA-256 of the uncompressed bytes; the compression may differ.
MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train-labels-idx1-ubyte.gz": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}
_DIGITS = tuple("0123456789")

_IDX_NAME = re.compile(
    r"(?P<set>.*?)(?P<split>train|t10k|test)-(?P<what>images|labels)[-.]idx\d-ubyte(\.gz)?"
)
_NPZ_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x", "y"),
    ("images", "labels"),
)
_NAMES_KEY = "class_names"

Pair = tuple[np.ndarray, np.ndarray]
"""Images `[N, ...]` and labels `[N]` as they are in the files."""


class IdxFiles(NamedTuple):
    """The four files of a set: images and labels."""

    train: tuple[Path, Path]
    test: tuple[Path, Path]


def load_embedded(folder: Path) -> Source:
    """MNIST from its four files, which are checked by their SHA-256."""
    train_images, train_labels, test_images, test_labels = (
        _read_mnist(folder / name) for name in MNIST_SHA256
    )
    train = with_ids(train_images, train_labels, 0)
    test = with_ids(test_images, test_labels, len(train_images))
    return Source("embedded", len(_DIGITS), train, test, _DIGITS)


def find_idx(where: Path) -> IdxFiles:
    """The four files of a set in a folder.

    Args:
        where: the folder, or the folder with what their names begin with (emnist/emnist-letters), which
            is needed only if it has several sets.

    Raises:
        UserError: if a file is missing, or there are several sets.
    """
    folder, prefix = (where, "") if where.is_dir() else (where.parent, where.name)
    if not folder.is_dir():
        raise UserError(f"idx:{where}: there is no folder {folder}")
    found: dict[str, dict[tuple[str, str], Path]] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # so that of a.gz and a the latter counts
        match = _IDX_NAME.fullmatch(path.name)
        if match and match["set"].startswith(prefix):
            split = "train" if match["split"] == "train" else "test"
            found.setdefault(match["set"], {})[split, match["what"]] = path
    if len(found) > 1:
        sets = ", ".join(f"idx:{folder / name.rstrip('-_.')}" for name in sorted(found))
        raise UserError(f"idx:{where} has the files of {len(found)} sets; name one: {sets}")
    files = next(iter(found.values()), {})
    for split in ("train", "test"):
        for what, axes in (("images", 3), ("labels", 1)):
            if (split, what) not in files:
                raise UserError(
                    f"idx:{where}: no file with the {what} of {split}; expected "
                    f"{prefix}{split}-{what}-idx{axes}-ubyte, or with .gz (test may be t10k)"
                )
    train, test = ((files[split, "images"], files[split, "labels"]) for split in ("train", "test"))
    return IdxFiles(train, test)


def read_idx(files: IdxFiles) -> tuple[Pair, Pair]:
    """The arrays of train and of test."""
    train, test = ((_read_idx(images), _read_idx(labels)) for images, labels in files)
    return train, test


def read_idx_labels(files: IdxFiles) -> tuple[np.ndarray, np.ndarray]:
    """The labels of train and of test alone."""
    return _read_idx(files.train[1]), _read_idx(files.test[1])


def _read_mnist(path: Path) -> np.ndarray:
    """The uint8 array of one of the four MNIST files, checked."""
    sha256 = MNIST_SHA256[path.name]
    expected = (
        f"{path}: expected the gzipped MNIST file with SHA-256 {sha256} (uncompressed), found "
    )
    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError:
        raise UserError(expected + "no file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{expected}one that cannot be read: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{expected}{len(content)} bytes with {found}")
    return _parse_idx(content, path)


def _read_idx(path: Path) -> np.ndarray:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse_idx(file.read(), path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read: {error}") from error


def _parse_idx(content: bytes, path: Path) -> np.ndarray:
    # Big-endian: two zero bytes, type code 8 (uint8), the number of axes, their sizes, the data.
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise UserError(
            f"{path} is no idx file of bytes: it begins with {content[:4].hex(' ') or 'nothing'}, "
            "expected 00 00 08 and the number of axes"
        )
    axes = content[3]
    shape = tuple(np.frombuffer(content, ">u4", count=axes, offset=4).tolist())
    size, expected = len(content) - 4 - 4 * axes, int(np.prod(shape, dtype=object))
    if size != expected:
        raise UserError(f"{path} has {size} bytes of data; {list(shape)} are {expected}")
    # Copied, because an array over `bytes` is read-only.
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def npz_keys(path: Path) -> dict[str, str]:
    """A file's own names of x_train, y_train and, where there are such, x_test, y_test, class_names.

    Raises:
        UserError: for a file that is missing, no npz, or lacks an array of those that belong together.
    """
    with _opened(path) as archive:
        there = {name.lower(): name for name in archive.files}
    spelling = next((keys for keys in _NPZ_KEYS if keys[0] in there), _NPZ_KEYS[0])
    missing = [key for key in spelling if key not in there]
    if missing:
        spellings = " or ".join(", ".join(keys) for keys in _NPZ_KEYS)
        raise UserError(
            f"{path} has no array {missing[0]}; expected {spellings}, found "
            f"{', '.join(sorted(there.values())) or 'none'}"
        )
    keys = dict(zip(_NPZ_KEYS[0], (there[key] for key in spelling), strict=False))
    return keys | ({_NAMES_KEY: there[_NAMES_KEY]} if _NAMES_KEY in there else {})


def read_npz(path: Path) -> tuple[Pair, Pair | None, tuple[str, ...]]:
    """The arrays of train and of test, if there is one, and the class names or none.

    Raises:
        UserError: as `npz_keys`; for arrays that are damaged, or pickled, which are not read.
    """
    keys = npz_keys(path)
    with _opened(path) as archive:
        arrays = {name: _read_array(archive, key, path) for name, key in keys.items()}
    names = tuple(str(name) for name in arrays.get(_NAMES_KEY, np.zeros(0)).ravel())
    test = (arrays["x_test"], arrays["y_test"]) if "x_test" in arrays else None
    return (arrays["x_train"], arrays["y_train"]), test, names


def read_npz_labels(path: Path) -> tuple[np.ndarray, np.ndarray | None, int]:
    """The labels of train and of test alone, and the number of class names; errors as `read_npz`."""
    keys = npz_keys(path)
    with _opened(path) as archive:
        train, test, names = (
            _read_array(archive, keys[name], path) if name in keys else None
            for name in ("y_train", "y_test", _NAMES_KEY)
        )
    return np.asarray(train), test, 0 if names is None else names.size


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    try:
        archive = np.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        # NumPy takes any other file for pickled objects, and its message advises to read those.
        reason = "" if isinstance(error, ValueError) else f" ({error})"
        raise UserError(f"{path} is no npz file of arrays{reason}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path} has one array; expected an npz file, as np.savez writes it")
    return archive


def _read_array(archive: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    try:
        return archive[key]
    except ValueError as error:
        if "pickle" not in str(error):
            raise UserError(f"{path}: array {key} is damaged ({error})") from error
        raise UserError(
            f"{path}: array {key} holds pickled Python objects, which are not read; save it as an array "
            "of numbers (names: of texts, dtype U)"
        ) from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise UserError(f"{path}: array {key} can't be read ({error})") from error
