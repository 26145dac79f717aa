"""`nanovllm generate`: continue one prompt, on the terminal, as it comes."""

import argparse
import sys
from typing import Any

from nanovllm.cli.errors import usage_errors
from nanovllm.cli.options import add_model_options, add_sampling_options, engine_options, sampling_options
from nanovllm.llm import LLM
from nanovllm.sampling_params import MAX_SEED, SamplingParams
from nanovllm.utils.tokenizer import Prompt

NOT_SHOWN = ("n", "logprobs", "prompt_logprobs")  # sampling options of which a terminal would show nothing


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Continue a prompt and write the text as it comes. Ctrl-C ends it."
    parser = commands.add_parser(
        "generate",
        help="continue a prompt",
        usage="nanovllm generate [PROMPT] --model PATH_OR_ID [options]",
        description=description,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue (default: standard input)")
    add_model_options(parser)
    add_sampling_options(parser, leave_out=NOT_SHOWN)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    llm, params = load(args)
    with llm:
        write_stream(llm, prompt, params)
    return 0


def load(args: argparse.Namespace) -> tuple[LLM, SamplingParams]:
    """The engine, for one request at a time, and how to sample."""
    with usage_errors():
        SamplingParams(**{"max_tokens": MAX_SEED, **sampling_options(args)})  # before the model is loaded
        llm = LLM(args.model, **{"max_num_seqs": 1, **engine_options(args)})
        return llm, SamplingParams(**{"max_tokens": llm.max_model_len, **sampling_options(args)})


def write_stream(llm: LLM, prompt: Prompt, params: SamplingParams) -> str:
    """Write what continues a prompt to standard output as it comes; all of it is returned."""
    with usage_errors():
        events = llm.stream([prompt], params)
    pieces: list[str] = []
    try:
        for event in events:
            pieces.append(event["text"])
            print(event["text"], end="", flush=True)
    finally:
        print(flush=True)
    return "".join(pieces)
