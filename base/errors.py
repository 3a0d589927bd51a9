"""Errors that are a person's to mend: shown as one line, without a traceback."""


class UserError(ValueError):
    """Bad input from a person: shown as one line (what, where, what to do), without a traceback."""


class StoppedError(UserError):
    """Ended because it was asked to, with everything saved: the same command goes on."""
