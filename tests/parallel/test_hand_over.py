"""The message of a step: whole, short, and never too long for its memory; the number of KV blocks is agreed on."""

import os
import pickle
import resource
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduled_batch import ScheduledBatch, StartedSequence, pack_step, unpack_step
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.workers import Job, Workers
from nanovllm.utils.mailbox import Mailbox, anonymous_file
from nanovllm.utils.ranks import Ranks


def test_mailbox_grows_and_readers_follow() -> None:
    writer = Mailbox(anonymous_file("test"))
    readers = [Mailbox(os.dup(writer.fd)) for _ in range(2)]
    for size in (1, 100, 10**6, 3, 5 * 10**6, 0):
        message = os.urandom(size)
        doorbell = writer.write(message)
        assert len(doorbell) < 32
        assert [bytes(reader.read(doorbell)) for reader in readers] == [message, message]
    for mailbox in (writer, *readers):
        mailbox.close()


def test_step_goes_over_whole() -> None:
    started = StartedSequence(1, 7, (1, 2, 3), 3, 0, (4,), SamplingParams(seed=1), 1)
    batch = ScheduledBatch((started,), ((0, 9),), np.array([0, 1]), np.array([1, 3]), 3, 1)
    sampled, received = unpack_step(pickle.loads(pickle.dumps(pack_step(np.array([5, 6]), batch))))
    assert sampled.tolist() == [5, 6]
    assert received.started == batch.started
    assert received.new_blocks == batch.new_blocks
    assert received.rows.tolist() == [0, 1]
    assert received.num_tokens.tolist() == [1, 3]
    assert (received.num_prefill_tokens, received.num_decode_tokens) == (3, 1)


def test_only_what_changed_goes_over() -> None:
    """The message of a decode step does not grow with the prompts."""
    sizes = []
    for prompt_len in (10, 1000):
        scheduler = Scheduler(BlockManager(1000, 16, True), 8, 8000)
        for seq_id in range(8):
            scheduler.add(Sequence(seq_id, [seq_id] * prompt_len, SamplingParams(), 0, prompt_len + 10))
        first = scheduler.schedule()
        scheduler.update(first, np.zeros(8, np.int64))
        sizes.append(len(pickle.dumps(pack_step(np.zeros(8, np.int64), scheduler.schedule()))))
    assert sizes[0] <= sizes[1] < sizes[0] + 8 * 16  # a new block or not


class AgreeingRunner:
    """Each rank has memory for another number of blocks; then counts what it is sent."""

    def __init__(self, ranks: Ranks) -> None:
        self.num_blocks = ranks.minimum(100 - 7 * ranks.rank)
        assert self.num_blocks == 100 - 7 * (ranks.size - 1)
        self._sampled = -1

    def execute(self, batch: ScheduledBatch) -> NDArray[np.int64]:
        assert len(batch.started[0].token_ids) == batch.num_prefill_tokens
        assert batch.num_decode_tokens == self._sampled
        return np.zeros(0, np.int64)

    def append_sampled(self, token_ids: NDArray[np.int64]) -> None:
        self._sampled = len(token_ids)


def test_ranks_agree_and_messages_of_any_length_arrive() -> None:
    workers = Workers()
    try:
        collectives = workers.start(Job(partial(AgreeingRunner), torch.device("cpu"), 3, 1))
        AgreeingRunner(Ranks(0, 3, collectives))
        for length in (1, 10**6, 10):
            started = StartedSequence(0, 0, tuple(range(length)), length, 0, (), SamplingParams(), 0)
            batch = ScheduledBatch((started,), (), np.zeros(1, np.int64), np.zeros(1, np.int64), length, length)
            workers.send(pack_step(np.zeros(length, np.int64), batch))
        workers.settle()
    finally:
        workers.close()
        workers.close()


def test_workers_of_a_process_with_many_open_files() -> None:
    """Descriptors above 1023 are too high for select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    workers, many = Workers(), [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        collectives = workers.start(Job(partial(AgreeingRunner), torch.device("cpu"), 2, 1))
        AgreeingRunner(Ranks(0, 2, collectives))
        workers.settle(timeout=60.0)
    finally:
        workers.close()
        for descriptor in many:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
