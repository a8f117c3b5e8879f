"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Something the user can put right; the message says what is wrong and what to do.

    The command line prints the message alone and exits with status 2; `--debug` shows the traceback.
    """
