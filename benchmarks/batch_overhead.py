"""What a row of `nanovllm batch` costs beside the model: files, tokenizer, scheduler. No weights, no GPU.

Rows of about 100 tokens are read from a JSON Lines file, tokenized, scheduled, decoded and written to another; the executor
between them answers with random tokens at once.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np

from nanovllm import LLM
from nanovllm.batch.job import BatchJob, BatchOptions
from nanovllm.batch.runner import BatchRun
from nanovllm.config import EngineConfig
from nanovllm.engine import llm_engine, request_feed
from nanovllm.engine.model_runner import StepOutput
from nanovllm.engine.scheduled_batch import ScheduledBatch
from nanovllm.models.config import ModelConfig

NUM_ROWS, NUM_WORDS, NUM_OUTPUT_TOKENS, NUM_ROUNDS = 100_000, 75, 32, 2
BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_BATCHED_TOKENS = 16, 16_384, 16_384


class NullExecutor:
    """An executor that computes nothing."""

    def __init__(self, folder: Path, model_config: ModelConfig, config: EngineConfig, max_model_len: int) -> None:
        self.block_size, self.num_kvcache_blocks = BLOCK_SIZE, NUM_BLOCKS
        self.max_num_batched_tokens = MAX_NUM_BATCHED_TOKENS
        self._left = np.zeros(config.max_num_seqs, np.int64)  # by row: tokens to compute before the next is sampled
        self._random = np.random.default_rng(0)

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """One random token for each sequence whose last token is in the batch."""
        self._left[batch.rows] = np.maximum(self._left[batch.rows], 1)
        for started in batch.started:
            self._left[started.row] = len(started.token_ids) - started.num_computed_tokens
        self._left[batch.rows] -= batch.num_tokens
        num_sampled = int(np.count_nonzero(self._left[batch.rows] == 0))
        return StepOutput(self._random.integers(1000, 40_000, num_sampled))

    def exit(self) -> None:
        """Nothing to give back."""


class Watch:
    """Adds up the seconds spent in functions, by part; a part within another counts for itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within: list[str] = []
        self._last = time.perf_counter()

    def switch(self) -> None:
        """Book the time since the last switch."""
        now = time.perf_counter()
        if self._within:
            self.seconds[self._within[-1]] = self.seconds.get(self._within[-1], 0.0) + now - self._last
        self._last = now

    def time(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._within.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._within.pop()

        return timed

    def time_iterator(self, part: str, iterator: Iterator[Any]) -> Iterator[Any]:
        """The iterator, each `next` timed."""
        step = self.time(part, lambda: next(iterator, None))
        while (item := step()) is not None:
            yield item


def write_rows(path: Path) -> None:
    """Chats and texts of words that are drawn."""
    rng = Random(0)
    words = ["the", "model", "answers", "question", "about", "seven", "rivers", "and", "mountains", "of", "Europe", "why"]
    with path.open("w") as file:
        for number in range(NUM_ROWS):
            text = " ".join(rng.choices(words, k=NUM_WORDS))
            body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": NUM_OUTPUT_TOKENS}
            row = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(row) + "\n")


def measure_batch_overhead(model: Path) -> dict[str, float]:
    """Microseconds a row: the quietest of some runs that are timed as a whole, and the parts of the quietest of others.

    The parts are those of a run that is timed at every call, which takes a while itself.
    """
    totals: list[float] = []
    parts: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, patch.object(llm_engine, "SingleRankExecutor", NullExecutor):
        source = Path(folder, "input.jsonl")
        write_rows(source)
        for number in range(NUM_ROUNDS):
            for kind in ("whole", "parts"):
                options = BatchOptions(input=source, output=Path(folder, f"{kind}{number}.jsonl"), model=str(model))
                job = BatchJob(options)
                with job.load() as llm:
                    if kind == "whole":
                        totals.append(_time_whole(job, llm))
                    else:
                        parts.append(_time_parts(job, llm))
                job.close()
    result = {**min(parts, key=lambda one: sum(one.values())), "total": min(totals)}
    return {f"{part}_us": round(1e6 * seconds / NUM_ROWS, 1) for part, seconds in result.items()}


def _time_whole(job: BatchJob, llm: LLM) -> float:
    """Seconds of a run, without those of the executor."""
    run, watch = job.prepare(llm), Watch()
    llm.executor.execute = watch.time("null model", llm.executor.execute)  # type: ignore[method-assign]
    watch.time("rest", job.run)(run)
    return watch.seconds["rest"]


def _time_parts(job: BatchJob, llm: LLM) -> dict[str, float]:
    """Seconds of a run by part, without those of the executor."""
    run: BatchRun = job.prepare(llm)
    watch, rows, scheduler, processor = Watch(), run._rows, llm.scheduler, llm.output_processor
    run._rows = lambda *args: watch.time_iterator("read", rows(*args))  # type: ignore[method-assign]
    run._write = watch.time("write", run._write)  # type: ignore[method-assign]
    processor.make_outputs = watch.time("decode", processor.make_outputs)  # type: ignore[method-assign]
    for name in ("schedule", "update", "add"):
        setattr(scheduler, name, watch.time("schedule", getattr(scheduler, name)))
    render, tokenize = (watch.time("tokenize", function) for function in (request_feed.render_chats, llm_engine.tokenize))
    llm.executor.execute = watch.time("null model", llm.executor.execute)  # type: ignore[method-assign]
    with patch.object(request_feed, "render_chats", render), patch.object(llm_engine, "tokenize", tokenize):
        watch.time("rest", job.run)(run)
    return {part: seconds for part, seconds in watch.seconds.items() if part != "null model"}


def print_batch_overhead(model: Path) -> dict[str, float]:
    """Measure, and print a table."""
    result = measure_batch_overhead(model)
    print(f"microseconds a row of {NUM_WORDS} words in and {NUM_OUTPUT_TOKENS} tokens out, without a model")
    for name, value in result.items():
        print(f"  {name.removesuffix('_us'):10s}{value:10g}")
    return result
