"""Measures the trained nets that the project publishes again, and compares with the published rows.

    python -m experiments.check_published              # all studies; about a minute
    python -m experiments.check_published --study=mnist

Exit status 1 if a value is another one.
"""

import sys
from pathlib import Path

from absl import flags

from distill_jax import command
from experiments.common import extras, published

STUDIES = ("mnist", "speech", "specialists")
_STUDY = flags.DEFINE_multi_enum("study", list(STUDIES), STUDIES, "Which studies.")


def main() -> None:
    """Prints a line for each published net."""
    differs = False
    for name in _STUDY.value:
        folder = Path(__file__).parent / name
        if not (folder / "published").is_dir():
            print(f"{name}: no nets are published yet")
            continue
        study = extras.import_study(f"experiments.{name}.study").STUDY
        for found in published.check(folder, study.published):
            verdict = "agrees" if found.agrees else "DIFFERS"
            print(
                f"{name}, {found.row}: {found.metric} {found.measured:g}, published "
                f"{found.published:g}: {verdict}"
            )
            differs |= not found.agrees
    if differs:
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
