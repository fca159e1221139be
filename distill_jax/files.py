"""Files that are there whole or not at all, and that say what they are.

A kill at any moment leaves the file or folder of before, or the new one, and never half of one. What is
read back carries the name and version of its format, and is checked.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.errors import UserError

# The partial file was removed by another writer, or a folder has the name already.
_ANOTHER_WAS_FIRST = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)
_END = 2**16
_CWD, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path of a file or folder that a user named, with `~` expanded.

    Raises:
        UserError: if it is empty, or an address such as gs://bucket/folder: runs rename folders and lock
            files, which a mounted bucket or share can do, and an address can't.

    Examples:
        >>> from distill_jax import files
        >>> str(files.local_path("runs/mnist"))
        'runs/mnist'
        >>> files.local_path("gs://bucket/runs")
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: gs://bucket/runs is not on a local file system; mount the bucket
        (gcsfuse) and name the mounted folder
    """
    name = os.fspath(path)
    if not name or "\0" in name:
        raise UserError(f"{name!r} is no path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name):  # a Path makes one slash of two
        raise UserError(
            f"{name} is not on a local file system; mount the bucket (gcsfuse) and name the mounted "
            "folder"
        )
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~ of a user that isn't there
        raise UserError(f"{name}: {error}") from error


def check_writable(folder: Path, name: str) -> None:
    """Raises a UserError, beginning `name=folder`, for a folder that can't be made or written to.

    Nothing is made, and nothing in it is changed.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{name}={folder}: {there} is no folder")
    try:
        with tempfile.TemporaryFile(dir=there):  # that has no name, so nothing is left of it
            pass
    except OSError as error:
        raise UserError(f"{name}={folder}: {there} can't be written to") from error


@contextlib.contextmanager
def write_whole(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Gives a partial name to write to, which takes the real name at the end.

    The partial name is this writer's own, so several may write the same file: the last one counts. A
    folder never replaces one that holds anything: if another writer made it meanwhile, that one stays.

    Args:
        path: of the file or folder; its parent must exist.
        replace: a folder does replace another, which is removed.

    Raises:
        OSError: if it can't be written; whatever the block raises. Nothing is left then.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if replace and path.is_dir():
            exchange(partial, path)  # what was there has the partial name now
            return
        try:
            os.replace(partial, path)
        except OSError as error:
            if error.errno not in _ANOTHER_WAS_FIRST or not path.exists():
                raise
    finally:
        remove(partial)


def exchange(one: Path, other: Path) -> None:
    """Swaps the names of two folders: in one step where the file system can, else in three renames."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = _CWD, os.fsencode(one), _CWD, os.fsencode(other)
    if hasattr(libc, "renameat2") and libc.renameat2(*paths, _EXCHANGE) == 0:
        return
    aside = other.with_name(f"{other.name}.{secrets.token_hex(4)}.partial")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_own_folder(folder: Path, own: Sequence[str], what: str) -> None:
    """Raises a UserError for a folder that holds anything else, before it is written to.

    Args:
        folder: need not be there.
        own: patterns of names (regular expressions) that may be there; their partial names may too.
        what: would be written, for the message.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    pattern = "|".join(own)
    others = sorted(n for n in names if not re.fullmatch(pattern, _written_name(n) or n))
    if others or folder.is_file():
        holds = "is a file" if folder.is_file() else f"holds {', '.join(others[:3])}"
        raise UserError(f"{folder} {holds}, so {what} is not written there: name an empty folder")


def leftovers(folder: Path, own: str) -> list[Path]:
    """What killed writers of files with that name left in a folder; a glob pattern may be given."""
    return [path for path in folder.glob(f"{own}.*.partial") if _written_name(path.name)]


def _written_name(name: str) -> str | None:
    """The name that a partial one of `write_whole` would have taken; None for any other name."""
    partial = re.fullmatch(r"(.+)\.[0-9a-f]{8}\.partial", name)
    return partial[1] if partial else None


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file, whole."""
    with write_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: that names the file, if it is not there or damaged.
    """
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_array(path: Path) -> np.ndarray:
    """Reads a .npy file; a UserError that names it if it is not there or damaged."""
    try:
        return np.load(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, or of all .npy files in a folder, in the order of their names."""
    digest = hashlib.sha256()
    for part in sorted(path.glob("*.npy")) if path.is_dir() else [path]:
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def content_of(folder: Path, paths: Iterable[Path] | None = None, ends: int = _END) -> str:
    """Names what a folder's files hold, without reading large ones whole: 16 hex digits.

    Of each file the name, the size and `ends` bytes at both ends count.

    Args:
        folder: of the files.
        paths: of those that count, anywhere in it. None: all, but those of folders within, and texts for
            people (.md).
        ends: bytes.

    Raises:
        UserError: for a file that can't be read.
    """
    if paths is None:
        paths = (path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(
                    f"{path.relative_to(folder)} {size} ".encode(errors="surrogateescape")
                )
                end = min(ends, size)
                digest.update(file.read(end))
                file.seek(size - end)
                digest.update(file.read(end))
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def check_sha256(path: Path, expected: str | None, again: str) -> None:
    """Raises a UserError unless the file is there with that SHA-256; `again` says what to do then."""
    if not path.exists() or sha256(path) != expected:
        raise UserError(f"{path} is damaged: its SHA-256 is not the one that was noted; {again}")


def read_versioned(path: Path, format: tuple[str, int], again: str) -> dict[str, Any]:
    """Reads a JSON file that carries its "format" and "version".

    Args:
        path: of the file.
        format: the name and version that this program reads.
        again: how to make the file again, for messages.

    Raises:
        UserError: for a file that is not there, damaged, or of another format or version.
    """
    try:
        meta = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from error
    found = (meta.get("format"), meta.get("version")) if isinstance(meta, dict) else (None, None)
    if found != format:
        raise UserError(
            f"{path} has format {found[0]} version {found[1]}; this program reads {format[0]} version "
            f"{format[1]}: {again}"
        )
    return meta


def versioned(format: tuple[str, int], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_versioned` reads, to be written with `write_json`."""
    return {"format": format[0], "version": format[1], **fields}


def write_sealed(path: Path, format: tuple[str, int], fields: Mapping[str, Any]) -> None:
    """Writes a versioned JSON file with its own SHA-256, whole."""
    write_json(path, versioned(format, {**fields, "sha256": sha256_of(fields)}))


def read_sealed(path: Path, format: tuple[str, int], again: str) -> dict[str, Any]:
    """Reads what `write_sealed` wrote, without its SHA-256; arguments and errors as `read_versioned`."""
    meta = read_versioned(path, format, again)
    if meta.pop("sha256", None) != sha256_of(meta):
        raise UserError(f"{path} is damaged: its SHA-256 is not the one that it notes")
    return meta


def check_same(what: str, there: Mapping[str, Any], now: Mapping[str, Any], hint: str = "") -> None:
    """Raises a UserError if fields differ, naming each with both values.

    Args:
        what: begins the message: "runs/mnist belongs to another config".
        there: what was found.
        now: what is expected; fields that it lacks are not compared.
        hint: ends the message.
    """
    differences = [
        f"{name} is {there.get(name)!r} there and {value!r} now"
        for name, value in now.items()
        if there.get(name) != value
    ]
    if differences:
        raise UserError(f"{what}: {', '.join(differences)}" + (f". {hint}" if hint else ""))


def sha256_of(meta: Mapping[str, Any]) -> str:
    """The SHA-256 of plain data, of all fields but the format's."""
    fields = {name: value for name, value in meta.items() if name not in ("format", "version")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
