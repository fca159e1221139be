"""The extras of setup.cfg: packages that the studies need and the library doesn't."""

import configparser
import importlib
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from distill_jax.errors import UserError

_SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"


def import_study(name: str) -> ModuleType:
    """Imports a study, such as "experiments.speech.study", if the packages of its extra are there.

    A study has the extra of its own name, or "report" if there is none of that name.

    Raises:
        UserError: packages are missing; names them and the command that installs them.
    """
    own = name.split(".")[-2]
    check(name, own if own in _extras() else "report")
    return importlib.import_module(name)


def check(what: str, extra: str) -> None:
    """Raises a UserError, with the command that installs them, if packages of an extra are missing."""
    missing = [package for package in _packages(_extras(), extra) if not _is_installed(package)]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install -e '.[{extra}]'")


def exit_without(extra: str) -> None:
    """Ends a command of one module with one line, before it imports what isn't there."""
    try:
        check("this command", extra)
    except UserError as error:
        sys.exit(f"error: {error}")


def _extras() -> dict[str, list[str]]:
    """The requirements of each extra."""
    setup = configparser.ConfigParser()
    setup.read(_SETUP)
    return {name: lines.split("\n") for name, lines in setup["options.extras_require"].items()}


def _packages(extras: dict[str, list[str]], extra: str) -> list[str]:
    """Names of the packages in an extra, and in the extras that it includes."""
    found = []
    for requirement in filter(None, extras[extra]):
        if included := re.match(r"distill_jax\[(.+)\]", requirement):
            found += [p for each in included[1].split(",") for p in _packages(extras, each)]
        else:
            found.append(re.split(r"[\s\[<>=]", requirement)[0])
    return found


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True
