"""What a worker does: a rank that computes in its own process what rank 0 tells it.

It waits for its socket to ring, without using the processor, and ends when the socket is closed or something fails.
"""

import pickle
import socket
import traceback
from typing import Any

import torch

from nanovllm.engine.scheduled_batch import unpack_step
from nanovllm.engine.workers import DONE, Failure, Job, Runner
from nanovllm.utils.collectives import Collectives, PeerLostError
from nanovllm.utils.mailbox import DOORBELL_SIZE, Mailbox
from nanovllm.utils.ranks import Ranks

USER_ERRORS = (ValueError, TypeError, FileNotFoundError)


class _ParentGoneError(Exception):
    """Nobody rings any more."""


class _RankZero:
    """The worker's end of the way to rank 0."""

    def __init__(self, rings: socket.socket, mailbox: Mailbox) -> None:
        self._rings = rings
        self._mailbox = mailbox

    def receive(self) -> Any:
        try:
            doorbell = self._rings.recv(DOORBELL_SIZE)
        except OSError as error:
            raise _ParentGoneError from error
        if not doorbell:
            raise _ParentGoneError
        return pickle.loads(self._mailbox.read(doorbell))

    def report_done(self) -> None:
        try:
            self._rings.send(DONE)
        except OSError as error:
            raise _ParentGoneError from error


def run_worker(rank: int, rings: socket.socket, mailbox_fd: int, store_fd: int) -> Failure | None:
    """Load, then compute step after step.

    Returns:
        Why it failed; None when rank 0 has gone.
    """
    rank_zero = _RankZero(rings, Mailbox(mailbox_fd))
    try:
        try:
            runner = _load(rank, rank_zero, store_fd)
        except USER_ERRORS as error:
            return Failure(traceback.format_exc(), user_error=type(error)(str(error)))
        while True:
            sampled, batch = unpack_step(rank_zero.receive())
            if len(sampled):
                runner.append_sampled(sampled)
            runner.execute(batch)
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
