"""Errors that a user can put right, as opposed to faults of this package.

Commands print a `UserError` in one line. Every other error but an OSError is a fault and keeps its traceback.
"""


class UserError(Exception):
    """A setting, an argument, a file, a server or a machine that cannot be used; the message names it and says what to
    do."""


class BadInput(UserError, ValueError):
    """A value, given by the user, that is refused."""


class MissingExtra(UserError, ImportError):
    """A package is needed that the base install does not bring; the message names the extra that does."""
