"""Executors: they hand a scheduled batch to every rank and bring back the sampled tokens."""

from pathlib import Path
from typing import Protocol

from nanovllm.config import EngineConfig
from nanovllm.engine.model_runner import ModelRunner, StepOutput
from nanovllm.engine.scheduled_batch import ScheduledBatch
from nanovllm.models.config import ModelConfig
from nanovllm.utils.ranks import Ranks


class Executor(Protocol):
    """What the engine's loop asks of those who compute."""

    block_size: int
    num_kvcache_blocks: int
    max_num_batched_tokens: int

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """Compute one step."""

    def exit(self) -> None:
        """Give back memory and processes. May be called twice."""


class SingleRankExecutor:
    """One rank, in the caller's process."""

    def __init__(self, folder: Path, model_config: ModelConfig, config: EngineConfig, max_model_len: int) -> None:
        self._runner: ModelRunner | None = ModelRunner(folder, model_config, config, max_model_len, Ranks())
        self.block_size = self._runner.block_size
        self.num_kvcache_blocks = self._runner.num_kvcache_blocks
        self.max_num_batched_tokens = self._runner.max_num_batched_tokens

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """See `Executor.execute`."""
        if self._runner is None:
            raise RuntimeError("the engine has exited: make a new LLM")
        return self._runner.execute(batch)

    def exit(self) -> None:
        """See `Executor.exit`."""
        self._runner = None
