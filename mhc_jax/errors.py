"""The exceptions that end a command with a message instead of a traceback."""


class UserError(ValueError):
    """Something the user can put right; the message says what is wrong and what to do.

    The command line prints the message alone and exits with status 2; `--debug` shows the traceback.
    """


class Preempted(Exception):
    """The run was told by SIGTERM to end, and has saved what there was to save. The command line exits with status 143."""
