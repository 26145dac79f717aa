"""`nanovllm chat`: talk to a model on the terminal."""

import argparse
import sys
from typing import Any

from nanovllm.cli.errors import UsageError
from nanovllm.cli.generate import NOT_SHOWN, load, write_stream
from nanovllm.cli.options import add_model_options, add_sampling_options, add_template_option
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.tokenizer import raise_refused, render_chats

DESCRIPTION = """\
Talk to a model: a line is a message, and the conversation goes on. /clear begins a new one, Ctrl-C ends an answer early,
Ctrl-D ends the chat. Without a terminal, each line of standard input is a message.
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "chat", help="talk to a model", usage="nanovllm chat --model PATH_OR_ID [options]", description=DESCRIPTION
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_template_option(parser)
    add_model_options(parser)
    add_sampling_options(parser, leave_out=NOT_SHOWN)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives `input` a history and an editor
    llm, params = load(args)
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(opening)
    with llm:
        while (line := _read_line()) is not None:
            if line == "/clear":
                messages = list(opening)
            elif line:
                messages = _answer(llm, params, [*messages, {"role": "user", "content": line}], args.template_args)
    return 0


def _read_line() -> str | None:
    """The next message; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None


def _answer(
    llm: LLM, params: SamplingParams, messages: list[dict[str, str]], template_args: dict[str, Any]
) -> list[dict[str, str]]:
    """The conversation with its answer, as far as it came; without the last message if it cannot be answered."""
    try:
        (prompt,) = raise_refused(render_chats([messages], ["the conversation"], llm.tokenizer, [template_args]))
        return [*messages, {"role": "assistant", "content": write_stream(llm, prompt, params)}]
    except (UsageError, ValueError) as error:
        if not sys.stdin.isatty():
            raise UsageError(str(error)) from error
        print(f"{error}\nThe message was dropped; /clear begins a new conversation.", file=sys.stderr)
        return messages[:-1]
