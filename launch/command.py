"""What all commands share: the config flag, and errors that are printed as one line."""

import re
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from distill_jax.errors import Stopped, UserError


def define_config() -> flags.FlagHolder:
    """Defines --config=FILE:PRESET; fields that the config lacks can't be set."""
    return config_flags.DEFINE_config_file(
        "config", None, "The study's config file and, after a colon, its preset.", lock_config=True
    )


def define_stages() -> flags.FlagHolder:
    """Defines --stages=NAME,NAME; an empty list is a mistake, such as an unset variable of a script."""
    flag = flags.DEFINE_list("stages", [], "Stages to run, by comma; all if not given.")
    flags.register_validator(
        "stages",
        lambda names: all(names) and (bool(names) or not flags.FLAGS["stages"].present),
        message="names of stages are expected, by comma",
    )
    return flag


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command; a UserError or a wrong flag ends it with one line and exit status 1.

    Other exit statuses: `processes.STOPPED` and `process_watch.LOST`.
    """
    flags.mark_flag_as_required("config")

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unexpected argument {argv[1]!r}; flags begin with --")
        logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except (Exception, KeyboardInterrupt) as error:
            _end(error)

    app.run(guarded, flags_parser=_parse)


def _end(error: BaseException) -> None:
    """Ends the command with one line, or with a traceback if the error is a bug."""
    from distill_jax import processes  # imported late: JAX reads its settings on import

    if isinstance(error, UserError):
        status, message = 1, f"error: {error}"
    elif isinstance(error, Stopped):
        status, message = processes.STOPPED, f"{error}; the same command resumes the run"
    elif isinstance(error, KeyboardInterrupt):
        status, message = 1, "\nstopped; the same command resumes the run from the last checkpoint"
    else:
        status, message = 1, "".join(traceback.format_exception(error)).rstrip()
    processes.exit_process(status, message)


def _parse(argv: list[str]) -> list[str]:
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv):
        return app.parse_flags_with_usage(argv)
    try:
        rest = flags.FLAGS(argv)
        # A missing file is noticed only when the config is read.
        getattr(flags.FLAGS["config"].value, "is_locked", None)
        return rest
    except AttributeError as error:  # ml_collections, for a field that the locked config lacks
        sys.exit(f"error: {_unknown_field(argv, str(error))}")
    except OSError as error:
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        sys.exit(f"error: no config file {path!r}: {str(error).strip().splitlines()[-1].strip()}")
    except flags.Error as error:
        # An error in a config file comes with its traceback; the last line is enough.
        sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")


def _unknown_field(argv: Sequence[str], error: str) -> str:
    """A message with the flag and the suggested field, from an `error` that names only the field."""
    keys = [arg.partition("=")[0] for arg in argv if arg.startswith("--config.")]
    given = next((key for key in keys if key.rpartition(".")[2] in error), "--config")
    meant = re.search(r'Did you mean \\*"(\w+)', error)
    return f"{given}: no such field" + (f"; did you mean {meant.group(1)}?" if meant else "")


def describe(error: BaseException) -> str:
    """An error of a user's own file in one line, with its place there."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UserError | SyntaxError):
        return message
    place = traceback.extract_tb(error.__traceback__)
    where = f" ({place[-1].filename}, line {place[-1].lineno})" if place else ""
    return f"{type(error).__name__}: {message}{where}"
