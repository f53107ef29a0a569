"""Errors that end a command with a message instead of a traceback."""


class CommandError(Exception):
    """The command cannot continue. The user sees the message only. The exit code is 1."""

    exit_code = 1


class UsageError(CommandError):
    """The arguments contradict each other or name something that does not exist. The exit code is 2."""

    exit_code = 2
