"""The two errors that a user meets: one line each, and an exit code each."""


class BadInput(Exception):
    """Something the user wrote is wrong; the message is one line that says what, where and what is allowed."""


class RunFailed(Exception):
    """The run cannot go on; the message is one line."""
