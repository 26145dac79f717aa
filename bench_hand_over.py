"""What it costs rank 0 to hand a step over to the other ranks, without a model: `bench.py --host-overhead` calls this.

The workers are real processes that apply each batch to their rows and do nothing else. A module of its own, because they
import it.
"""

import statistics
import time
from functools import partial
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.input_batch import InputBatch
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.workers import Job, Runner, Step, Workers
from nanovllm.utils.ranks import Ranks

PROMPT_LEN, BLOCK_SIZE, WARM_UP = 200, 16, 20
TOKEN = 5


class HostRunner:
    """A ModelRunner without a model: every sequence samples the same token."""

    def __init__(self, max_num_seqs: int, max_model_len: int, ranks: Ranks) -> None:
        self.ranks = ranks
        self.input_batch = InputBatch(max_num_seqs, max_model_len, BLOCK_SIZE)
        self._sampled_rows = np.zeros(0, np.int64)

    def execute(self, batch: ScheduledBatch) -> NDArray[np.int64]:
        """Make the step's inputs."""
        self._sampled_rows = self.input_batch.apply(batch).sampled_rows
        token_ids = np.full(len(self._sampled_rows), TOKEN, np.int64)
        if self.ranks.rank == 0:
            self.append_sampled(token_ids)
        return token_ids

    def append_sampled(self, token_ids: NDArray[np.int64]) -> None:
        """See `ModelRunner.append_sampled`."""
        self.input_batch.append(self._sampled_rows, token_ids)


def measure_hand_over(size: int, num_seqs: int = 256, num_steps: int = 300) -> dict[str, float]:
    """Time decode steps of `num_seqs` sequences on rank 0, alone and with `size - 1` workers.

    Returns:
        Medians in microseconds a step: one rank's own inputs, the same with the hand-over, and the difference.
    """
    make_runner = partial(HostRunner, num_seqs, PROMPT_LEN + num_steps + WARM_UP)
    alone = statistics.median(_time_steps(make_runner(Ranks()), None, num_seqs, num_steps))
    workers = Workers()
    try:
        collectives = workers.start(Job(make_runner, torch.device("cpu"), size, num_threads=1))
        workers.settle()
        runner = make_runner(Ranks(0, size, collectives))
        together = statistics.median(_time_steps(runner, workers, num_seqs, num_steps))
    finally:
        workers.close()
    return {"inputs_us": alone, "inputs_and_hand_over_us": together, "hand_over_us": together - alone}


def _time_steps(runner: Runner, workers: Workers | None, num_seqs: int, num_steps: int) -> list[float]:
    max_len = PROMPT_LEN + num_steps + WARM_UP
    manager = BlockManager(num_seqs * -(-max_len // BLOCK_SIZE), BLOCK_SIZE, enable_prefix_caching=True)
    scheduler = Scheduler(manager, num_seqs, max_num_batched_tokens=num_seqs * PROMPT_LEN)
    rng = Random(0)
    for seq_id in range(num_seqs):
        prompt = [rng.randrange(10_000) for _ in range(PROMPT_LEN)]
        scheduler.add(Sequence(seq_id, prompt, SamplingParams(temperature=0.6), seed=seq_id, max_total_tokens=max_len))
    times: list[float] = []
    token_ids = np.zeros(0, np.int64)
    while not scheduler.is_finished():
        batch = scheduler.schedule()
        begin = time.perf_counter()
        if workers is not None:
            workers.send(Step(token_ids, batch))
        token_ids = runner.execute(batch)
        times.append(1e6 * (time.perf_counter() - begin))
        scheduler.update(batch, token_ids)
    return times[WARM_UP:]
