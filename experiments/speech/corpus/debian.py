"""Fetches the corpus that the study's tables are made on: two talking games in Debian's free archive.

Their licences let anyone pass the games on, changed ones too if they are marked as such, if the notices
are kept and no fee is asked for the games themselves; so the notices are kept in the cache.
"""

import gzip
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from distill_jax.errors import UserError
from experiments.speech.corpus import amazon_queen, steel_sky
from experiments.speech.corpus.recordings import Recording

# Each with the version that this was tried with. The interpreter is needed for a table in it, with
# which the first game's texts are coded.
PACKAGES = {
    "beneath-a-steel-sky": "0.0372-8",
    "flight-of-the-amazon-queen": "1.0.0-9",
    "scummvm": "2.7.0+dfsg-1",
}


def recordings(cache: str | os.PathLike[str]) -> list[Recording]:
    """The recordings of both games, fetched and unpacked on the first call.

    Args:
        cache: a folder of 0.4 GB, made if it isn't there. In it: the packages' files, a folder
            each with what was in them, and `licences/` with the packages' notices.

    Raises:
        UserError: a package can't be fetched or unpacked, or isn't the one expected.
    """
    cache = Path(cache).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    games, queen, interpreter = (_unpacked(cache, name) for name in PACKAGES)
    return steel_sky.recordings(
        games / "usr/share/scummvm/beneath-a-steel-sky", interpreter / "usr/games/scummvm"
    ) + amazon_queen.recordings(queen / "usr/share/scummvm/flight-of-the-amazon-queen")


def _unpacked(cache: Path, name: str) -> Path:
    """The folder with a package's files; it appears whole or not at all."""
    folder = cache / name
    if not folder.is_dir():
        package = _package(cache, name)
        partial = cache / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        remedy = f"if {package} is damaged, delete it and run this again"
        _run(["dpkg-deb", "-x", str(package), str(partial)], cache, name, remedy)
        partial.rename(folder)
    _copy_notices(folder / "usr/share/doc" / name, cache / "licences" / name)
    return folder


def _package(cache: Path, name: str) -> Path:
    """A package's file in the cache, fetched if it isn't there."""
    if not any(cache.glob(f"{name}_*.deb")):
        remedy = (
            f"if the package is not known, apt-get update may help; or place {name}_*.deb of Debian "
            f"(tried with version {PACKAGES[name]}) in {cache}"
        )
        # Not straight into the cache: what a broken download leaves must not be taken for the package.
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


def _copy_notices(documents: Path, licences: Path) -> None:
    """Keeps a package's copyright file, and the game's own readme, which its licence asks for."""
    if not (documents / "copyright").is_file():
        raise UserError(f"{documents} has no copyright file; delete its package's folder and retry")
    licences.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(documents / "copyright", licences / "copyright")
    for readme in documents.glob("readme.txt.gz"):
        (licences / "readme.txt").write_bytes(gzip.decompress(readme.read_bytes()))
