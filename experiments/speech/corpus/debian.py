"""Fetches the corpus that the study's tables are made on: two talking games in Debian's free archive.

Their licences let anyone pass the games on, changed ones too if they are marked as such, if the notices
are kept and no fee is asked for the games themselves; so the notices are kept in the cache.
"""

import gzip
import os
from pathlib import Path

from experiments.common.debian import unpacked
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
    folders = {name: unpacked(cache, name, tried) for name, tried in PACKAGES.items()}
    for name, folder in folders.items():
        _copy_readme(folder / "usr/share/doc" / name, Path(cache) / "licences" / name)
    games, queen, interpreter = folders.values()
    return steel_sky.recordings(
        games / "usr/share/scummvm/beneath-a-steel-sky", interpreter / "usr/games/scummvm"
    ) + amazon_queen.recordings(queen / "usr/share/scummvm/flight-of-the-amazon-queen")


def _copy_readme(documents: Path, licences: Path) -> None:
    """Keeps the game's own readme, which its licence asks for."""
    for readme in documents.glob("readme.txt.gz"):
        (licences / "readme.txt").write_bytes(gzip.decompress(readme.read_bytes()))
