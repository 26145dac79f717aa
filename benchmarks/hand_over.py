"""What it costs rank 0 to hand a step over to the other ranks, without a model.

The workers are real processes, which import this module, apply each batch to their rows and do nothing else.
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
from nanovllm.engine.scheduled_batch import ScheduledBatch, pack_step
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.workers import Job, Runner, Workers
from nanovllm.utils.ranks import Ranks

PROMPT_LEN, BLOCK_SIZE, WARM_UP = 200, 16, 20
TOKEN = 5


class HostRunner:
    """A ModelRunner without a model: every sequence samples the same token."""

    def __init__(self, max_num_seqs: int, max_model_len: int, ranks: Ranks) -> None:
        self.ranks = ranks
        self.input_batch = InputBatch(max_num_seqs, max_model_len, BLOCK_SIZE)

    def execute(self, batch: ScheduledBatch) -> NDArray[np.int64]:
        """Make the step's inputs."""
        token_ids = np.full(len(self.input_batch.apply(batch).sampled_rows), TOKEN, np.int64)
        if self.ranks.rank == 0:
            self.input_batch.sampling_inputs()
            self.append_sampled(token_ids)
        return token_ids

    def append_sampled(self, token_ids: NDArray[np.int64]) -> None:
        """See `ModelRunner.append_sampled`."""
        self.input_batch.append(token_ids)


def measure_hand_over(size: int, num_seqs: int = 256, num_steps: int = 300) -> dict[str, float]:
    """Time decode steps of `num_seqs` sequences.

    Returns:
        Medians in microseconds a step: how long a rank makes its inputs, how long rank 0 sends before that, and from
        the step's beginning how long it takes until every rank has its inputs, beyond one rank's own.
    """
    make_runner = partial(HostRunner, num_seqs, PROMPT_LEN + num_steps + WARM_UP)
    workers = Workers()
    try:
        collectives = workers.start(Job(make_runner, torch.device("cpu"), size, num_threads=1))
        workers.settle()
        runner = make_runner(Ranks(0, size, collectives))
        send, inputs, all_ready = (1e6 * median for median in _time_steps(runner, workers, num_seqs, num_steps))
    finally:
        workers.close()
    return {"inputs_us": inputs, "rank_0_sends_us": send, "all_ranks_ready_us": all_ready - inputs}


def _time_steps(runner: Runner, workers: Workers, num_seqs: int, num_steps: int) -> tuple[float, float, float]:
    """Medians in seconds: rank 0 sends, makes its inputs, and all from sending to the last worker's report."""
    max_len = PROMPT_LEN + num_steps + WARM_UP
    manager = BlockManager(num_seqs * -(-max_len // BLOCK_SIZE), BLOCK_SIZE, enable_prefix_caching=True)
    scheduler = Scheduler(manager, num_seqs, max_num_batched_tokens=num_seqs * PROMPT_LEN)
    rng = Random(0)
    for seq_id in range(num_seqs):
        prompt = [rng.randrange(10_000) for _ in range(PROMPT_LEN)]
        scheduler.add(Sequence(seq_id, prompt, SamplingParams(temperature=0.6), seed=seq_id, max_total_tokens=max_len))
    times: list[tuple[float, float, float]] = []
    token_ids = np.zeros(0, np.int64)
    while not scheduler.is_finished():
        batch = scheduler.schedule()
        begin = time.perf_counter()
        workers.send(pack_step(token_ids, batch))
        sent = time.perf_counter()
        token_ids = runner.execute(batch)
        made = time.perf_counter()
        workers.settle()
        times.append((sent - begin, made - sent, time.perf_counter() - begin))
        scheduler.update(batch, token_ids)
    send, inputs, all_ready = (statistics.median(column) for column in zip(*times[WARM_UP:], strict=True))
    return send, inputs, all_ready


def print_hand_over(size: int, num_seqs: int) -> dict[str, float]:
    """Measure, and print a table."""
    result = measure_hand_over(size, num_seqs)
    print(f"microseconds a decode step of {num_seqs} sequences on {size} ranks")
    for name, value in result.items():
        print(f"  {name:24s} {value:.0f}")
    return result
