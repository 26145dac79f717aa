"""Exit codes, and the errors that are a user's to mend: a line on the terminal instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_ROWS_FAILED = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class UsageError(Exception):
    """What the command was told is wrong."""


class FailedError(Exception):
    """What it was told is right, but it could not be done."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Where what a user gave is checked: what is raised then is about that."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise UsageError(str(error)) from error
