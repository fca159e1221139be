"""Exceptions that end a run: a mistake that the user can correct, or a request to stop."""


class UserError(ValueError):
    """A wrong config key, file, shape or value; the message says which and what was expected.

    Command lines print the message alone, without a traceback.
    """


class Stopped(Exception):
    """The run was asked to stop and has saved its state; the same command resumes it."""
