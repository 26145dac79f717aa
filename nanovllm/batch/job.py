"""BatchJob: one input, one output, one model; begun, resumed, or refused."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nanovllm.batch.manifest import Manifest
from nanovllm.batch.reader import survey
from nanovllm.batch.requests import RowParser
from nanovllm.batch.results import ResultFile
from nanovllm.batch.runner import BatchRun
from nanovllm.batch.statistics import Statistics
from nanovllm.config import EngineConfig
from nanovllm.llm import LLM
from nanovllm.sampling_params import MAX_SEED, SamplingParams, check_int
from nanovllm.utils.checkpoint import resolve_checkpoint

# Of the engine's options those that change results by more than the order of sums; others may differ when a job is resumed.
_ENGINE_OPTIONS_OF_RESULTS = (
    "max_model_len",
    "dtype",
    "device",
    "attention_backend",
    "tensor_parallel_size",
    "batch_invariant",
)
_GARBAGE = 10_000  # objects to make between two looks for garbage
_WINDOW = 8  # times max_num_seqs rows are sorted by their prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What to run.

    Args:
        input, output: files; the output is made, or continued.
        model: a checkpoint's folder, a `.gguf` file, or an id on the Hugging Face hub.
        engine: keywords of `EngineConfig`.
        sampling: keywords of `SamplingParams`, for rows that do not say. Without `max_tokens` a row may use what
            `max_model_len` leaves.
        template_args: passed on to the chat template, where a row does not say.
        seed: rows without a seed get one that is a function of this and the row's number.
        sort_by_prefix: run rows of some window in the order of their prompts.
        restart: forget what the output holds.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of its range.
    """

    input: Path
    output: Path
    model: str
    engine: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    template_args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    sort_by_prefix: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        EngineConfig.from_kwargs(**self.engine)
        SamplingParams(**{"max_tokens": MAX_SEED, **self.sampling})
        check_int("seed", self.seed, minimum=0, maximum=MAX_SEED)
        if self.output.suffix in (".gz", ".bz2", ".xz", ".zst", ".parquet"):
            raise ValueError(f"output {self.output} will be plain JSON Lines, which can be continued: name it .jsonl")
        if self.output.exists() and self.input.exists() and self.output.samefile(self.input):
            raise ValueError(f"output {self.output} is the input: give another")

    def of_results(self) -> dict[str, Any]:
        """The options that can change a result, the defaults written out."""
        engine = EngineConfig.from_kwargs(**self.engine)
        sampling = SamplingParams(**{"max_tokens": MAX_SEED, **self.sampling})
        values = {name: getattr(engine, name) for name in _ENGINE_OPTIONS_OF_RESULTS}
        chosen = {one.name: getattr(sampling, one.name) for one in fields(sampling)}
        chosen["max_tokens"] = self.sampling.get("max_tokens")
        return {**values, **chosen, "seed": self.seed, "template_args": self.template_args}


class BatchJob:
    """A batch, checked against what its output holds already. Nothing is loaded before it runs.

    Args:
        options: what to run.

    Raises:
        FileNotFoundError: there is no such input or model.
        OSError: the input cannot be read, or the output not be written.
        ValueError: the output belongs to other work, or to a run that goes on.
    """

    def __init__(self, options: BatchOptions) -> None:
        self.options = options
        self._folder = resolve_checkpoint(options.model)
        self.survey = survey(options.input)
        self._results = ResultFile(options.output)
        try:
            self._manifest = self._begin()
            self.found = self._results.repair(self.survey.end)
        except BaseException:
            self._results.close()
            raise

    def _begin(self) -> Manifest:
        """Begin anew, or see that what is there can be continued."""
        now = Manifest.of(self.survey.digest, self._folder, self.options.of_results())
        if self.options.restart:
            self._results.clear()
        if self._results.is_empty:
            now.write(self.options.output)
            return now
        before = Manifest.read(self.options.output)
        if before is None:
            raise ValueError(f"output {self.options.output} was not written by this command; --restart overwrites it")
        if changed := before.differences(now):
            raise ValueError(
                f"output {self.options.output} holds results of other work: {'; '.join(changed)}. "
                f"Run it as before, give another output, or --restart to start anew"
            )
        return before

    @property
    def num_left(self) -> int:
        """Rows that have no result yet."""
        return self.survey.num_rows - self.found.done.count

    def load(self) -> LLM:
        """The engine, which the caller closes.

        Raises:
            As `LLM`.
        """
        return LLM(self._folder, **self.options.engine)

    def prepare(self, llm: LLM, on_change: Callable[[Statistics], None] = lambda statistics: None) -> BatchRun:
        """A run of what is left.

        Args:
            llm: what to run it on.
            on_change: told as the run goes on.
        """
        defaults = {"max_tokens": llm.max_model_len, **self.options.sampling}
        parser = RowParser(defaults, self.options.template_args, self.options.seed)
        return BatchRun(llm, parser, self._results, self.model_name, self._manifest.created, on_change)

    def run(self, run: BatchRun) -> bool:
        """Run what is left. See `BatchRun.run`."""
        max_num_seqs = EngineConfig.from_kwargs(**self.options.engine).max_num_seqs
        window = _WINDOW * max_num_seqs if self.options.sort_by_prefix else 0
        with _collector_at_rest():
            return run.run(self.options.input, self.found.done, window)

    @property
    def model_name(self) -> str:
        """What results call the model: the id on the hub, or a folder's name without the way to it."""
        path = Path(self.options.model).expanduser()
        return path.resolve().name if path.exists() else self.options.model

    def close(self) -> None:
        """Let others have the output."""
        self._results.close()


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Spare Python's garbage collector the million objects of the libraries, which otherwise take it a third of our time.

    And let it look for garbage less often: thousands of our objects are in use at a time, and nearly none are in cycles.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_GARBAGE, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
