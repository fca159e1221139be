"""Fetches packages of Debian's archive that contain the studies' data.

A cache is a folder with the files of the packages, a folder with the content of each, and `licences/`
with their copyright files.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import unquote

from distill_jax.errors import UserError
from distill_jax.files import write_whole


def unpacked(cache: str | os.PathLike[str], name: str, tried: str) -> Path:
    """The folder with a package's files, fetched and unpacked on the first call.

    Args:
        cache: created if missing; the folder appears in it only once it is complete.
        name: of the package.
        tried: the version with which the caller was tested, for messages.

    Raises:
        UserError: if the package can't be fetched or unpacked, or has no copyright file.
    """
    cache = Path(cache).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    folder, note = cache / name, cache / "licences" / name / "package"  # the file that it is of
    if not folder.is_dir():
        package = _package(cache, name, tried)
        remedy = f"if {package} is damaged, delete it and run this again"
        with write_whole(folder) as partial:
            _run(["dpkg-deb", "-x", str(package), str(partial)], cache, name, remedy)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(package.name)
    packages = sorted(cache.glob(f"{name}_*.deb"))
    if packages and note.exists() and note.read_text() != packages[-1].name:
        raise UserError(
            f"{folder} is of {note.read_text()}, but {cache} has {packages[-1].name}: delete one of them"
        )
    _copy_copyright(folder / "usr/share/doc" / name, cache / "licences" / name)
    return folder


def version(cache: str | os.PathLike[str], name: str) -> str:
    """The version of a package in the cache, from its file name; "" if the file is missing."""
    packages = sorted(Path(cache).glob(f"{name}_*.deb"))
    return unquote(packages[-1].name.split("_")[1]) if packages else ""


def _package(cache: Path, name: str, tried: str) -> Path:
    """The file of a package in the cache, fetched if missing."""
    if not any(cache.glob(f"{name}_*.deb")):
        remedy = (
            f"if the package is not known, apt-get update may help; or place {name}_*.deb of Debian "
            f"(tried with version {tried}) in {cache}"
        )
        # Not directly into the cache: an incomplete download must not be mistaken for the package.
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as download:
            _run(["apt-get", "download", name], Path(download), name, remedy)
            for package in Path(download).glob("*.deb"):
                package.rename(cache / package.name)
    packages = sorted(cache.glob(f"{name}_*.deb"))
    if not packages:
        raise UserError(f"apt-get download {name} left no {name}_*.deb")
    return packages[-1]


def _run(command: list[str], folder: Path, package: str, remedy: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        reason = f"{command[0]} is not installed"
        raise UserError(f"package {package}: {reason}; {remedy}") from error
    except subprocess.CalledProcessError as error:
        said = "; ".join(error.stderr.strip().splitlines()) or f"exit {error.returncode}"
        reason = f"{command[0]} failed ({said})"
        raise UserError(f"package {package}: {reason}; {remedy}") from error


def _copy_copyright(documents: Path, licences: Path) -> None:
    if not (documents / "copyright").is_file():
        raise UserError(f"{documents} has no copyright file; delete its package's folder and retry")
    licences.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(documents / "copyright", licences / "copyright")
