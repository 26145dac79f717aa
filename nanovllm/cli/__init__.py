"""The command line: `nanovllm batch`, `nanovllm generate`, `nanovllm chat`."""

import argparse
import os
import sys
from collections.abc import Sequence

from nanovllm.cli import batch, chat, generate
from nanovllm.cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, FailedError, UsageError

DESCRIPTION = """\
Offline inference of language models.

exit codes: 0 all is well; 1 it could not go on, such as on a full disk; 2 wrong usage; 3 (batch) done, but rows have errors;
130 after Ctrl-C, 143 after SIGTERM.
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="nanovllm", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (batch, generate, chat):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words; those that the process was started with if None.

    Returns:
        The exit code.
    """
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except FailedError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # who read our output has gone; Python's own flush at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _fail(message: str, code: int) -> int:
    print(f"nanovllm: {message}", file=sys.stderr)
    return code
