"""What a batch shows while it runs and when it ends, on the terminal."""

import sys
import time
from typing import Any

from tqdm import tqdm

from nanovllm.batch.statistics import Outcome, Statistics

_REFRESH_SECONDS = 0.5
_REFRESH_SECONDS_OF_LOGS = 60.0  # where the bar does not overwrite itself


class BatchProgress:
    """A bar of rows, with tokens a second, cache hits and errors beside it; tqdm estimates the end.

    Args:
        num_rows: of the whole input.
        num_done: of these, done before.
        enabled: whether to show it.
    """

    def __init__(self, num_rows: int, num_done: int, enabled: bool) -> None:
        self._interval = _REFRESH_SECONDS if sys.stderr.isatty() else _REFRESH_SECONDS_OF_LOGS
        self._bar: Any = tqdm(
            total=num_rows,
            initial=num_done,
            desc="rows",
            unit="row",
            dynamic_ncols=True,
            disable=not enabled,
            mininterval=self._interval,
            smoothing=0.05,
        )
        self._num_done = num_done
        self._last = time.monotonic()
        self._tokens = 0.0

    def update(self, statistics: Statistics) -> None:
        """Show how far it is, if some time has passed since."""
        now = time.monotonic()
        if now - self._last < self._interval:
            return
        tokens = sum(one.prefill_tokens + one.decode_tokens for one in statistics.bins)
        speed = (tokens - self._tokens) / (now - self._last)
        self._last, self._tokens = now, tokens
        shown = f"{speed:,.0f} tok/s, {percent(statistics.cached_tokens, statistics.prompt_tokens)} cached"
        if statistics.num_errors:
            shown += f", {statistics.num_errors:,} errors"
        self._bar.set_postfix_str(shown, refresh=False)
        self._advance(statistics)

    def close(self, statistics: Statistics) -> None:
        """Show the last state and leave it."""
        self._advance(statistics)
        self._bar.close()

    def _advance(self, statistics: Statistics) -> None:
        self._bar.update(self._num_done + statistics.num_rows - self._bar.n)


def percent(part: int, whole: int) -> str:
    """A share, for people."""
    return f"{part / whole:.1%}" if whole else "0%"


def summarize(outcome: Outcome) -> str:
    """A few lines about a run that has ended."""
    statistics, errors = outcome.statistics, outcome.num_errors
    seconds = max(statistics.seconds, 1e-9)
    lines = [f"{outcome.num_done:,} of {outcome.num_rows:,} rows done" + f", {errors:,} of them with errors" * (errors > 0)]
    if statistics.num_rows:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in statistics.finish_reasons.most_common())
        cached = percent(statistics.cached_tokens, statistics.prompt_tokens)
        lines += [
            f"this run: {statistics.num_rows:,} rows in {seconds:,.1f} s, {statistics.num_rows / seconds:,.1f} rows/s",
            f"tokens: {statistics.prompt_tokens:,} in ({cached} cached), {statistics.output_tokens:,} out, "
            f"{statistics.output_tokens / seconds:,.1f} out/s; completions by their end: {reasons or 'none'}",
        ]
    for code, count in statistics.error_codes.most_common():
        first = next((bad.message for bad in statistics.errors if bad.code == code), "")
        lines.append(f"{code}: {count:,}, such as: {first:.160}")
    return "\n".join(lines)
