"""The one exception a user is meant to see: its message is printed as a single line and the process exits with 2."""


class UserError(Exception):
    """A mistake of the user: the message says what was wrong, where, and what to do about it."""
