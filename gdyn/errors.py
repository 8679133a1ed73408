"""Errors a user can cause. The launch programs turn them into one message and exit code 2, without a traceback."""


class UserError(ValueError):
    """A run file, JSON, data set, checkpoint or environment that cannot work. The message says what was found, what
    was expected and what to do, naming file and key."""


class MissingFile(UserError, FileNotFoundError):
    """A file the user named, or that must accompany one, does not exist."""
