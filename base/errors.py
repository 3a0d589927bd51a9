"""Errors that a person can mend. Commands show them as one line, without a traceback."""


class UserError(ValueError):
    """Bad input from a person. The message is one line: what, where, what to do."""


class StoppedError(UserError):
    """A signal stopped the command and everything is saved: a repeated command goes on."""
