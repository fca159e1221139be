"""What the launchers' commands share: the config and its flags, and how they end."""

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from distill_jax import command
from distill_jax.errors import Stopped


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
        command.check_arguments(argv)
        logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except (Exception, KeyboardInterrupt) as error:
            _end(error)

    app.run(guarded, flags_parser=_parse)


def _end(error: BaseException) -> None:
    """Ends the command with one line, or with a traceback if the error is a bug."""
    from distill_jax import processes  # imported late: JAX reads its settings on import

    if command.is_mistake(error):
        status, message = 1, f"error: {command.describe(error)}"
    elif isinstance(error, Stopped):
        status, message = processes.STOPPED, f"{error}; the same command resumes the run"
    elif isinstance(error, KeyboardInterrupt):
        status, message = 1, "\nstopped; the same command resumes the run from the last checkpoint"
    else:
        status, message = 1, "".join(traceback.format_exception(error)).rstrip()
    processes.exit_process(status, message)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags and reads the config; whatever is wrong with either ends with one line."""
    file = _config_file(argv)
    if file is not None and not file.is_file():
        sys.exit(f"error: --config: no config file {str(file)!r}")
    try:
        rest = command.parse(argv)
        config = flags.FLAGS["config"].value
    except Exception as error:  # the config file's own, or ml_collections' about a field
        raised_in = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) or (file and str(file) in raised_in):
            sys.exit(f"error: --config={file}: {command.describe(error)}")
        sys.exit(f"error: {_unknown_field(argv, str(error))}")
    if config is not None and not isinstance(config, ConfigDict):
        sys.exit(f"error: --config={file}: get_config gives no ConfigDict but {type(config)}")
    if config is not None:
        _check_given_once(argv)
    return rest


def _check_given_once(argv: Sequence[str]) -> None:
    """Ends the process if a tuple is given twice: both would be joined; of others the last counts."""
    keys = [arg.partition("=")[0].removeprefix("--config.") for arg in argv]
    for key, value in config_flags.get_override_values(flags.FLAGS["config"]).items():
        if isinstance(value, tuple) and keys.count(key) > 1:
            sys.exit(
                f"error: --config.{key} is given {keys.count(key)} times: give all values at once"
            )


def _config_file(argv: Sequence[str]) -> Path | None:
    """The file that --config names, as the flag does: up to a colon."""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            given = value if equals else "".join(argv[i + 1 : i + 2])
            return Path(given.partition(":")[0])
    return None


def _unknown_field(argv: Sequence[str], error: str) -> str:
    """A message with the flag and the suggested field, from an `error` that names only the field."""
    keys = [arg.partition("=")[0] for arg in argv if arg.startswith("--config.")]
    named = [key for key in keys if any(part in error for part in key.split(".")[1:])]
    meant = re.search(r'Did you mean \\*"(\w+)', error)
    if not named:
        return f"{', '.join(keys) or '--config'}: {' '.join(error.split())}"
    return f"{named[0]}: no such field" + (f"; did you mean {meant.group(1)}?" if meant else "")
