"""A model runner to which things happen, chosen by the first token of a prompt, and what the tests share around it."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from nanovllm import LLM, SamplingParams
from nanovllm.engine import model_runner, parallel_executor
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduled_batch import ScheduledBatch

WORKER_RAISES, WORKER_IS_KILLED, RANK_0_RAISES, RANK_0_RAISES_AT_THE_END, CTRL_C = range(1, 6)
LIMIT = 10.0  # seconds until the caller must know
VARIABLE = "NANOVLLM_TEST_LOADING"


class ScriptedError(Exception):
    """What goes wrong by plan."""


class ScriptedRunner(ModelRunner):
    """In the middle of a step, when the other ranks wait in a collective, does what the prompt's first token says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._script = 0
        loading = os.environ.get(VARIABLE)
        if self.ranks.rank == 1 and loading == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.ranks.rank == 1 and loading == "raises":
            raise ScriptedError("while loading")
        if self.ranks.rank == 1 and loading == "user error":
            raise ValueError("the user's mistake")
        if self.ranks.rank == 1 and loading == "long error":
            raise ValueError("no end of it " * 100_000 + "at last")
        if self.ranks.rank == 0 and loading == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        if self.ranks.rank == 1 and loading == "threads":
            raise ValueError(f"{torch.get_num_threads()} threads")
        if self.ranks.rank > 0:
            model_runner.sample = only_rank_0_samples
        self.model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(self._play)

    def execute(self, batch: ScheduledBatch) -> NDArray[np.int64]:
        if batch.started:
            self._script = batch.started[0].token_ids[0]
        token_ids = super().execute(batch)
        if self.ranks.rank == 0 and self._script == RANK_0_RAISES_AT_THE_END:
            raise ScriptedError("when the others are through")
        return token_ids

    def _play(self, *args: object) -> None:
        if not self.ranks.collectives:
            return
        if self.ranks.rank == 1 and self._script == WORKER_RAISES:
            raise ScriptedError("in a worker")
        if self.ranks.rank == 1 and self._script == WORKER_IS_KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.ranks.rank == 0 and self._script == RANK_0_RAISES:
            raise ScriptedError("in rank 0")
        if self.ranks.rank == 0 and self._script == CTRL_C:
            os.kill(os.getpid(), signal.SIGINT)


def only_rank_0_samples(*args: object) -> None:
    raise AssertionError("a worker samples")


@contextmanager
def scripted(loading: str = "") -> Iterator[None]:
    """Engines that are made meanwhile have scripted runners."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_executor, "ModelRunner", ScriptedRunner)
        patch.setenv(VARIABLE, loading)
        yield


def make_llm(folder: Path, size: int, **options: object) -> LLM:
    defaults: dict[str, object] = {"max_model_len": 128, "num_kvcache_blocks": 40, "device": "cpu", "dtype": "float32"}
    return LLM(folder, tensor_parallel_size=size, **{**defaults, **options})


def generate(llm: LLM, first_token: int = 0) -> list[list[int]]:
    """Two requests, greedy and seeded, of which the first begins with `first_token`."""
    params = [SamplingParams(temperature=0.0, max_tokens=12), SamplingParams(temperature=0.8, seed=7, max_tokens=12)]
    return [output["token_ids"] for output in llm.generate([[first_token, 8, 9], [10, 11]], params, use_tqdm=False)]


def workers() -> list[psutil.Process]:
    """What this process has started and still runs, but for the helpers that other tests leave: multiprocessing's."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if is_alive(child) and not is_helper(child)]


def is_helper(process: psutil.Process) -> bool:
    try:
        return any(name in argument for argument in process.cmdline() for name in ("resource_tracker", "forkserver"))
    except psutil.NoSuchProcess:
        return False


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def in_time() -> Iterator[None]:
    """What is inside must not take longer than a caller may be left waiting."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < LIMIT
