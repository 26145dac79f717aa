"""What a worker does: a rank that computes in its own process what rank 0 tells it.

It waits for its pipe to ring, without using the processor, and ends when the pipe is closed or something fails.
"""

import pickle
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from nanovllm.engine.scheduled_batch import Step
from nanovllm.engine.workers import Failure, Job, Runner
from nanovllm.utils.collectives import Collectives, PeerLostError
from nanovllm.utils.mailbox import Mailbox
from nanovllm.utils.ranks import Ranks

USER_ERRORS = (ValueError, TypeError, FileNotFoundError)


class _ParentGoneError(Exception):
    """Nobody rings any more."""


class _RankZero:
    """The worker's end of the way to rank 0."""

    def __init__(self, pipe: "Connection[Any, Any]", mailbox: Mailbox) -> None:
        self._pipe = pipe
        self._mailbox = mailbox

    def receive(self) -> Any:
        try:
            doorbell = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise _ParentGoneError from error
        return pickle.loads(self._mailbox.read(doorbell))

    def report_done(self) -> None:
        try:
            self._pipe.send_bytes(b"")
        except OSError as error:
            raise _ParentGoneError from error


def run_worker(rank: int, pipe: "Connection[Any, Any]", mailbox_fd: int, store_fd: int) -> Failure | None:
    """Load, then compute step after step.

    Returns:
        Why it failed; None when rank 0 has gone.
    """
    rank_zero = _RankZero(pipe, Mailbox(mailbox_fd))
    try:
        try:
            runner = _load(rank, rank_zero, store_fd)
        except USER_ERRORS as error:
            return Failure(traceback.format_exc(), user_error=type(error)(str(error)))
        while True:
            step: Step = rank_zero.receive()
            if len(step.sampled):
                runner.append_sampled(step.sampled)
            runner.execute(step.batch)
            rank_zero.report_done()
    except _ParentGoneError:
        return None
    except PeerLostError:
        return Failure(traceback.format_exc(), lost_peer=True)


def _load(rank: int, rank_zero: _RankZero, store_fd: int) -> Runner:
    job: Job = rank_zero.receive()
    torch.set_num_threads(job.num_threads)
    rank_zero.report_done()  # all that needs time to start is there; rank 0 comes to the collectives
    collectives = Collectives(rank, job.size, Ranks(rank, job.size).place(job.device), store_fd)
    runner = job.make_runner(Ranks(rank, job.size, collectives))
    rank_zero.report_done()
    return runner
