"""`nanovllm batch`: a file of requests in, a file of results out."""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from nanovllm.batch.job import BatchJob, BatchOptions
from nanovllm.batch.progress import BatchProgress, summarize
from nanovllm.batch.reader import InputError
from nanovllm.batch.report import write_report
from nanovllm.batch.runner import BatchRun
from nanovllm.batch.statistics import Outcome, Statistics
from nanovllm.cli.errors import EXIT_INTERRUPTED, EXIT_ROWS_FAILED, EXIT_TERMINATED, FailedError, usage_errors
from nanovllm.cli.options import (
    add_model_options,
    add_sampling_options,
    add_template_option,
    engine_options,
    sampling_options,
)

DESCRIPTION = """\
Run a file of requests and write a file of results: one line a request, as it finishes, in any order.

INPUT: JSON Lines, also as .gz, .bz2, .xz or .zst, or .parquet. A row is
  - a line of OpenAI's batch format: custom_id, method, url (/v1/chat/completions or /v1/completions), body; or
  - plain: {"prompt": ...} or {"messages": [...]}, with any fields of a body beside it, and a custom_id if you like.
A body may have the sampling fields of OpenAI's and vLLM's servers. Its model is not looked at: all rows run on --model.

OUTPUT: JSON Lines in OpenAI's batch format: id ("batch_req_N" for row N of the input, counted from 0), custom_id, response
(with choices and usage) or error (code and message). A row that cannot run becomes an error; the others run.

Started again with the same arguments, it goes on where it was interrupted, however that came: results in OUTPUT are kept,
and what is missing is run. OUTPUT.manifest.json tells whether input, model or an option that changes results is another;
then it refuses to go on. Rows without a seed get one by their number, so that a batch that was resumed has the same results.
Options that do not change results (max-num-seqs, memory and the like) may be changed in between.
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "batch",
        help="run a file of requests",
        usage="nanovllm batch INPUT OUTPUT --model PATH_OR_ID [options]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 all rows done; 3 all done, some with errors; 1, 2, 130, 143: not done, see nanovllm --help",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="requests")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="results; made, or continued")
    parser.add_argument("--restart", action="store_true", help="forget the results in OUTPUT")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page about the run")
    help_text = "run rows in the order of their prompts, within a window of 8 * max-num-seqs: more hits in the prefix cache"
    parser.add_argument("--sort-by-prefix", action="store_true", help=f"{help_text} where rows with one prefix lie apart")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of rows without one of their own (default: 0)")
    add_template_option(parser)
    add_model_options(parser)
    add_sampling_options(parser, leave_out=("seed",))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    with usage_errors():
        sampling = {name: value for name, value in sampling_options(args).items() if name != "seed"}
        options = BatchOptions(
            input=args.input,
            output=args.output,
            model=args.model,
            engine=engine_options(args),
            sampling=sampling,
            template_args=args.template_args,
            seed=args.seed,
            sort_by_prefix=args.sort_by_prefix,
            restart=args.restart,
        )
        job = BatchJob(options)
    with closing(job):
        statistics, stopped_by = _run_job(job, args.quiet)
        outcome = Outcome(
            title=f"{args.input.name}, {job.model_name}",
            statistics=statistics,
            num_rows=job.survey.num_rows,
            num_done=job.found.done.count + statistics.num_rows,
            num_errors=job.found.num_errors + statistics.num_errors,
        )
    if not args.quiet:
        print(summarize(outcome), file=sys.stderr)
    if args.report is not None:
        try:
            write_report(args.report, outcome)
        except OSError as error:
            raise FailedError(f"the report could not be written: {error}. The results are in {args.output}") from error
    if stopped_by is not None and outcome.num_done < outcome.num_rows:
        print(
            f"nanovllm: interrupted; the same command runs what is left: {outcome.num_rows - outcome.num_done:,} rows",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED if stopped_by == signal.SIGINT else EXIT_TERMINATED
    return EXIT_ROWS_FAILED if outcome.num_errors else 0


def _run_job(job: BatchJob, quiet: bool) -> tuple[Statistics, int | None]:
    """What was done, and the signal that ended it early."""
    if job.num_left == 0:
        return Statistics(), None
    with usage_errors():
        llm = job.load()
    progress = BatchProgress(job.survey.num_rows, job.found.done.count, enabled=not quiet)
    with llm:
        run = job.prepare(llm, progress.update)
        with _stopped_by_signals(run) as signals:
            try:
                job.run(run)
            except (OSError, InputError) as error:
                raise FailedError(
                    f"{error}. Results that were written are whole, in {job.options.output}; "
                    f"the same command goes on with the other rows"
                ) from error
            finally:
                progress.close(run.statistics)
    return run.statistics, signals[0] if signals else None


@contextmanager
def _stopped_by_signals(run: BatchRun) -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM end the run after the step it is in; a second one ends the process."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        run.stop()
        os.write(2, b"\nnanovllm: writing what is done; again to end at once\n")

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
