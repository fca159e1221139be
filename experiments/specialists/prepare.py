"""Prepares the data set `glyphs`: Han characters as the typefaces of Debian's archive draw them.

    python -m experiments.specialists.prepare --out=DIR

About 60 packages, 0.5 GB, are fetched and unpacked to 2.1 GB; then drawing is a minute on two cores.
The same command resumes a killed one. `--config.data.source=DIR` then trains on it.
"""

from absl import flags

from distill_jax import files
from distill_jax.command import run
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


def main() -> None:
    """Runs the command."""
    out = files.local_path(_OUT.value)
    files.check_writable(out, "--out")
    classes = characters.first(_CHARACTERS.value)
    folder = files.local_path(_PACKAGES.value) if _PACKAGES.value else out / "packages"
    found = packages.faces(folder, classes)
    print(f"prepared {pipeline.prepare(found, classes, out, _PROCESSES.value)}")


if __name__ == "__main__":
    run(main)
