"""Fetches the corpus of the study's tables: two games with speech in Debian's free archive.

Their licences allow copies, also changed ones if they are marked as such, if the notices are kept and
the games themselves are free of charge. So the notices are kept in the cache.
"""

import gzip
import os
from pathlib import Path

from experiments.common.debian import unpacked
from experiments.speech.corpus import amazon_queen, steel_sky
from experiments.speech.corpus.recordings import Recording

# Each with the version that was tested. The interpreter contains a table that decodes the texts of the
# first game.
PACKAGES = {
    "beneath-a-steel-sky": "0.0372-8",
    "flight-of-the-amazon-queen": "1.0.0-9",
    "scummvm": "2.7.0+dfsg-1",
}


def recordings(cache: str | os.PathLike[str]) -> list[Recording]:
    """The recordings of both games, fetched and unpacked on the first call.

    Args:
        cache: a folder of 0.4 GB, created if missing. It gets the files of the packages, a folder with
            the content of each, and `licences/` with their notices.

    Raises:
        UserError: if a package can't be fetched or unpacked, or is not the expected one.
    """
    folders = {name: unpacked(cache, name, tried) for name, tried in PACKAGES.items()}
    for name, folder in folders.items():
        _copy_readme(folder / "usr/share/doc" / name, Path(cache) / "licences" / name)
    games, queen, interpreter = folders.values()
    return steel_sky.recordings(
        games / "usr/share/scummvm/beneath-a-steel-sky", interpreter / "usr/games/scummvm"
    ) + amazon_queen.recordings(queen / "usr/share/scummvm/flight-of-the-amazon-queen")


def _copy_readme(documents: Path, licences: Path) -> None:
    """Keeps the readme of the game, as its licence requires."""
    for readme in documents.glob("readme.txt.gz"):
        (licences / "readme.txt").write_bytes(gzip.decompress(readme.read_bytes()))
