"""The one exception for mistakes that a user can put right."""


class UserError(ValueError):
    """A wrong config key, file, shape or value; the message says which and what was expected.

    Command lines print the message alone, without a traceback.
    """
