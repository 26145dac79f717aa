"""Statistics of a batch, as long as it may run: everything here is of bounded size."""

import time
from collections import Counter
from dataclasses import dataclass, field

from nanovllm.batch.response import completions_of
from nanovllm.batch.rows import BadRow
from nanovllm.engine.llm_engine import StepResult
from nanovllm.outputs import RequestOutput

MAX_BINS = 240  # of the timeline; twice as wide when there would be more
FIRST_BIN_SECONDS = 0.25
MAX_EXAMPLES = 20  # errors that the report shows


@dataclass(slots=True)
class TimeBin:
    """What happened in a part of the time.

    prefill_tokens, decode_tokens: computed tokens.
    busy_seconds: the steps' time.
    seq_seconds, kv_seconds: sequences in the batch, and share of the KV cache in use, times the steps' time.
    """

    prefill_tokens: float = 0.0
    decode_tokens: float = 0.0
    busy_seconds: float = 0.0
    seq_seconds: float = 0.0
    kv_seconds: float = 0.0

    def add(self, other: "TimeBin") -> None:
        """Take in another part."""
        self.prefill_tokens += other.prefill_tokens
        self.decode_tokens += other.decode_tokens
        self.busy_seconds += other.busy_seconds
        self.seq_seconds += other.seq_seconds
        self.kv_seconds += other.kv_seconds


@dataclass(slots=True)
class Statistics:
    """What a run has done so far.

    bins, bin_seconds: the timeline from the start on, each bin that wide.
    num_rows: rows that have a result now, of this run.
    prompt_tokens, cached_tokens, output_tokens: of those; cached ones were found in the prefix cache.
    prompt_lengths, output_lengths: how many rows, or completions, by length's number of bits: 0, 1, 2 to 3, 4 to 7, ...
    finish_reasons: of completions.
    error_codes, errors: how many of each code, and the first of them.
    """

    start: float = field(default_factory=time.monotonic)
    bins: list[TimeBin] = field(default_factory=list)
    bin_seconds: float = FIRST_BIN_SECONDS
    num_rows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    output_lengths: Counter[int] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    error_codes: Counter[str] = field(default_factory=Counter)
    errors: list[BadRow] = field(default_factory=list)

    @property
    def num_errors(self) -> int:
        """Rows whose result is an error."""
        return self.error_codes.total()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def add_step(self, step: StepResult) -> None:
        """Take in a step that ends now; one that is longer than a bin is spread over several."""
        end = self.seconds
        start = max(0.0, end - step.seconds)
        while end >= MAX_BINS * self.bin_seconds:
            self._halve()
        first, last = int(start / self.bin_seconds), int(end / self.bin_seconds)
        while len(self.bins) <= last:
            self.bins.append(TimeBin())
        for place in range(first, last + 1):
            seconds = min(end, (place + 1) * self.bin_seconds) - max(start, place * self.bin_seconds)
            share = seconds / (end - start) if last > first else 1.0
            self.bins[place].add(
                TimeBin(
                    prefill_tokens=share * step.num_prefill_tokens,
                    decode_tokens=share * step.num_decode_tokens,
                    busy_seconds=share * step.seconds,
                    seq_seconds=share * step.seconds * step.num_seqs,
                    kv_seconds=share * step.seconds * step.kv_usage,
                )
            )

    def _halve(self) -> None:
        """Make two bins one."""
        for left, right in zip(self.bins[::2], self.bins[1::2], strict=False):
            left.add(right)
        self.bins = self.bins[::2]
        self.bin_seconds *= 2

    def add_output(self, output: RequestOutput) -> None:
        """Take in a row that ran."""
        self.num_rows += 1
        self.prompt_tokens += output["num_prompt_tokens"]
        self.cached_tokens += output["num_cached_tokens"]
        self.prompt_lengths[output["num_prompt_tokens"].bit_length()] += 1
        for completion in completions_of(output):
            num_tokens = len(completion["token_ids"])
            self.output_tokens += num_tokens
            self.output_lengths[num_tokens.bit_length()] += 1
            self.finish_reasons[completion["finish_reason"]] += 1

    def add_error(self, bad: BadRow) -> None:
        """Take in a row that could not be run."""
        self.num_rows += 1
        self.error_codes[bad.code] += 1
        if len(self.errors) < MAX_EXAMPLES:
            self.errors.append(bad)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What there is to say of a batch when a run of it has ended.

    title: what ran.
    statistics: of this run.
    num_rows, num_done, num_errors: rows of the input; those that have a result; results that are errors.
    """

    title: str
    statistics: Statistics
    num_rows: int
    num_done: int
    num_errors: int
