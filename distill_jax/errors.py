"""What ends a run: a mistake that the user can put right, or a request to stop."""


class UserError(ValueError):
    """A wrong config key, file, shape or value; the message says which and what was expected.

    Command lines print the message alone, without a traceback.
    """


class Stopped(Exception):
    """The run was asked to stop, and what there was to save is saved; the same command goes on."""
