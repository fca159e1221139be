"""Command lines: a mistake of the user ends with one line and exit status 1."""

import errno
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from distill_jax.errors import UserError

_OF_THE_DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


def run(main: Callable[..., None], *arguments: str) -> None:
    """Runs a command, whose flags are absl's.

    Args:
        main: is given what stands beside the flags.
        arguments: what must stand there, by name.
    """

    def guarded(argv: Sequence[str]) -> None:
        check_arguments(argv, *arguments)
        logging.set_verbosity(logging.WARNING)  # hides JAX's messages about missing backends
        try:
            main(*argv[1:])
        except KeyboardInterrupt:
            sys.exit("\nstopped; the same command resumes")
        except Exception as error:
            if not is_mistake(error):
                raise
            sys.exit(f"error: {describe(error)}")

    app.run(guarded, flags_parser=parse)


def parse(argv: list[str]) -> list[str]:
    """Parses flags; a wrong one ends the process with one line."""
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv):
        return app.parse_flags_with_usage(argv)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {describe(error)}")


def check_arguments(argv: Sequence[str], *arguments: str) -> None:
    """Ends the process unless these arguments, and no more, stand beside the flags."""
    given = argv[1:]
    if len(given) < len(arguments):
        sys.exit(f"error: {arguments[len(given)]} is missing")
    if len(given) > len(arguments):
        sys.exit(f"error: unexpected argument {given[len(arguments)]!r}; flags begin with --")


def is_mistake(error: BaseException) -> bool:
    """Whether an error is the user's to mend, a full disk among them, and no bug."""
    return isinstance(error, UserError) or getattr(error, "errno", None) in _OF_THE_DISK


def describe(error: BaseException) -> str:
    """An error in one line; one that a user's own file raised, with its place there."""
    if isinstance(error, flags.Error):  # what a config file raised comes with its traceback
        return str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UserError | SyntaxError | OSError):
        return message
    place = traceback.extract_tb(error.__traceback__)
    where = f" ({place[-1].filename}, line {place[-1].lineno})" if place else ""
    return f"{type(error).__name__}: {message}{where}"
