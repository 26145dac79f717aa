"""The main program of a worker: a rank that does in its own process what rank 0 tells it.

It waits for its pipe to ring, without using the processor, and leaves when its parent does, whatever it is doing.
"""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch

from nanovllm.engine.workers import Failure, Job, Step
from nanovllm.utils.collectives import Collectives, PeerLostError
from nanovllm.utils.mailbox import Mailbox
from nanovllm.utils.ranks import Ranks

USER_ERRORS = (ValueError, TypeError, FileNotFoundError)
PARENT_CHECK_SECONDS = 0.5


class ParentGoneError(Exception):
    """Nobody rings any more."""


class Worker:
    """One worker's rank and its ways to rank 0."""

    def __init__(self, rank: int, pipe: "Connection[Any, Any]", mailbox: Mailbox, store_fd: int) -> None:
        self.rank = rank
        self._pipe = pipe
        self._mailbox = mailbox
        self._store_fd = store_fd
        self._loading = True

    def run(self) -> None:
        """Load, then compute step after step until the parent has gone or something fails."""
        job: Job = self._receive()
        torch.set_num_threads(job.num_threads)
        self._report(None)
        device = Ranks(self.rank, job.size).place(job.device)
        collectives = Collectives(self.rank, job.size, device, self._store_fd)
        runner = job.make_runner(Ranks(self.rank, job.size, collectives))
        self._report(None)
        self._loading = False
        while True:
            step: Step = self._receive()
            if len(step.sampled):
                runner.append_sampled(step.sampled)
            runner.execute(step.batch)
            self._report(None)

    def report_failure(self, error: BaseException) -> None:
        """Tell rank 0 why this rank ends."""
        what = f"rank {self.rank} (process {os.getpid()}) raised:\n{''.join(traceback.format_exception(error))}"
        failure = Failure(what, isinstance(error, PeerLostError))
        if self._loading and isinstance(error, USER_ERRORS):
            failure = Failure(what, user_error=type(error)(str(error)))
        self._report(failure)

    def _receive(self) -> Any:
        try:
            doorbell = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise ParentGoneError from error
        return pickle.loads(self._mailbox.read(doorbell))

    def _report(self, failure: Failure | None) -> None:
        try:
            self._pipe.send_bytes(b"" if failure is None else pickle.dumps(failure))
        except OSError as error:
            raise ParentGoneError from error


def main() -> NoReturn:
    """Started by `Workers`; never returns."""
    rank, parent, pipe_fd, mailbox_fd, store_fd = (int(argument) for argument in sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    worker = Worker(rank, Connection(pipe_fd), Mailbox(mailbox_fd), store_fd)
    status = 1
    try:
        worker.run()
    except ParentGoneError:
        status = 0
    except BaseException as error:
        with suppress(ParentGoneError):
            worker.report_failure(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the destructors of a group whose other ranks have gone may wait for them


def _leave_with(parent: int) -> None:
    """End this process within a second of its parent, even in the middle of a collective.

    Not by PR_SET_PDEATHSIG, which counts the end of the thread that started the worker as the end of the parent.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)
