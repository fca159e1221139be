"""Prepares the data set `glyphs`: Han characters as the typefaces of Debian's archive draw them.

    python -m experiments.specialists.prepare --out=DIR

About 60 packages, 0.5 GB, are fetched and unpacked to 2.1 GB; then drawing is a minute on two cores.
The same command resumes a killed one. `--config.data.source=DIR` then trains on it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from distill_jax.errors import UserError
from experiments.common import extras

extras.exit_without("specialists")

from experiments.specialists.corpus import characters, packages, pipeline  # noqa: E402

_OUT = flags.DEFINE_string(
    "out", None, "Folder for the set and its unfinished work.", required=True
)
_CHARACTERS = flags.DEFINE_integer(
    "characters",
    1000,
    "Classes. Up to 1759 are taken from the characters that China, Taiwan and Japan share, which "
    "nearly every typeface has; up to 2965 from all that are most used in Japan.",
)
_PACKAGES = flags.DEFINE_string(
    "packages", None, "Folder for the packages, or with them; packages in --out if not given."
)
_PROCESSES = flags.DEFINE_integer(
    "processes", 0, "Processes that draw; 0 for one per core.", lower_bound=0
)


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; flags begin with --")
    out = Path(_OUT.value)
    try:
        classes = characters.first(_CHARACTERS.value)
        found = packages.faces(Path(_PACKAGES.value or out / "packages"), classes)
        folder = pipeline.prepare(found, classes, out, _PROCESSES.value)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command resumes")
    print(f"prepared {folder}")


if __name__ == "__main__":
    app.run(main)
