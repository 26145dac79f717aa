"""Workers: the processes of ranks 1 and on, as rank 0 sees them.

A worker is sent objects and answers each with a report: that it is done, or why it failed. It failed when it says so or has
ended; whatever happens it does not stay silent, because its end closes its socket. Messages go through a `Mailbox`, the
socket only rings. Workers own nothing that outlives them, so that they are ended by SIGKILL, without politeness and without
wait.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nanovllm.engine.scheduled_batch import ScheduledBatch
from nanovllm.engine.worker_main import MAX_REPORT
from nanovllm.utils.collectives import Collectives
from nanovllm.utils.interrupts import hold_interrupts
from nanovllm.utils.mailbox import Mailbox, anonymous_file
from nanovllm.utils.ranks import Ranks

GRACE = 2.0  # seconds in which ranks that have lost another one, or are through with a step, say so
DONE = b"done"  # a worker's report on a step
_PROGRAM = Path(__file__).with_name("worker_main.py")


class Runner(Protocol):
    """What a worker runs; `ModelRunner` is one."""

    def execute(self, batch: ScheduledBatch) -> object:
        """Compute one step."""

    def append_sampled(self, token_ids: NDArray[np.int64]) -> None:
        """Take in the tokens that rank 0 sampled in the step before."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is started for. Pickled."""

    make_runner: Callable[[Ranks], Runner]
    device: torch.device  # rank 0's
    size: int  # ranks
    num_threads: int  # of torch, for each rank


class Failure(NamedTuple):
    """Why a worker ended. Pickled, by a process that may not be able to import this class, as a tuple."""

    what: str  # its traceback, or its signal
    lost_peer: bool = False  # a consequence of another rank's failure
    user_error: Exception | None = None  # what rank 0 is to raise in place of a WorkerError


class WorkerError(RuntimeError):
    """A worker process failed; the message carries its traceback or its signal."""


class Workers:
    """Owns the processes, from `start` to `close`, and the ways to them."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._closed = False
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # by rank, as the next
        self._sockets: dict[int, socket.socket] = {}
        self._busy: set[int] = set()  # who owes a report
        self._collectives: Collectives | None = None
        self._mailbox = Mailbox(anonymous_file("nanovllm-mailbox"))
        self._store_fd: int | None = anonymous_file("nanovllm-store")

    def start(self, job: Job) -> Collectives:
        """Start a process for each rank but 0, and wait until it is there. Then it loads, which `settle` waits for.

        Returns:
            Rank 0's end of the collectives.

        Raises:
            WorkerError, PeerLostError: one could not be started. `close` is still to be called.
        """
        with hold_interrupts():
            for rank in range(1, job.size):
                self._spawn(rank, job)
        self.send(job)
        self.settle()
        self._busy = set(self._processes)  # their report on loading is to come
        store_fd, self._store_fd = self._store_fd, None
        assert store_fd is not None, "started only once"
        self._collectives = Collectives(0, job.size, job.device, store_fd, self.check)
        if job.device.type == "cuda":  # a kernel of NCCL waits for ever for a rank that has gone; gloo's sockets tell
            for process in self._processes.values():
                threading.Thread(target=_abort_after, args=(process, self._collectives), daemon=True).start()
        return self._collectives

    def send(self, message: object) -> None:
        """Send the same to all workers, once they are done with what they were sent before.

        Raises:
            WorkerError: one has failed.
        """
        self.settle()
        doorbell = self._mailbox.write(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        for rank, worker in self._sockets.items():
            self._busy.add(rank)
            try:
                worker.send(doorbell)
            except OSError:  # it has ended; its report, or the lack of one, says why
                self.settle(GRACE)

    def settle(self, timeout: float | None = None) -> None:
        """Wait until every worker is done with what it was sent.

        Args:
            timeout: seconds; None waits as long as it takes, since a worker that fails says so.

        Raises:
            WorkerError: one has failed. A `user_error` is raised in its place.
            TimeoutError: not all are done.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        failures: list[Failure] = []
        for rank in sorted(self._busy):
            if deadline is not None and not wait([self._sockets[rank]], max(0.0, deadline - time.monotonic())):
                continue
            self._busy.discard(rank)
            failure = self._receive_report(rank)
            if failure is not None:
                failures.append(failure)
                deadline = deadline or time.monotonic() + GRACE  # the others fail for lack of this one
        if failures:
            _raise_cause(failures)
        if self._busy:
            raise TimeoutError(f"ranks {sorted(self._busy)} are still busy")

    def check(self) -> None:
        """Raise if a worker has ended.

        Raises:
            WorkerError: one has.
        """
        if any(process.poll() is not None for process in self._processes.values()):
            self.settle(GRACE)

    def close(self) -> None:
        """End the processes. May be called twice, and does nothing in a fork of the process that made them."""
        if self._closed or os.getpid() != self._owner:
            return
        with hold_interrupts():
            for process in self._processes.values():
                process.kill()
            for process in self._processes.values():
                process.wait()
            for worker in self._sockets.values():
                worker.close()
            if self._collectives is not None:
                self._collectives.close()
            if self._store_fd is not None:
                os.close(self._store_fd)
            self._mailbox.close()
            self._closed = True

    def _spawn(self, rank: int, job: Job) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # what is sent arrives in one piece
        assert self._store_fd is not None, "started only once"
        fds = [theirs.fileno(), self._mailbox.fd, self._store_fd]
        arguments = [str(number) for number in (rank, os.getpid(), *fds)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),  # "" is the current folder
            "OMP_NUM_THREADS": str(job.num_threads),
        }
        # Its own session: Ctrl-C in a terminal is for rank 0. And no import of the caller's main module.
        self._processes[rank] = subprocess.Popen(
            [sys.executable, str(_PROGRAM), *arguments],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=fds,
            start_new_session=True,
        )
        self._sockets[rank] = ours
        theirs.close()

    def _receive_report(self, rank: int) -> Failure | None:
        process = self._processes[rank]
        name = f"rank {rank} (process {process.pid})"
        try:
            report = self._sockets[rank].recv(MAX_REPORT)
        except OSError:
            report = b""
        if not report:
            status = process.wait()  # its socket is closed only by its end
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
            return Failure(f"{name} {how}")
        if report == DONE:
            return None
        failure = Failure(*pickle.loads(report))
        return failure._replace(what=f"{name} failed:\n{failure.what}")


def _abort_after(process: "subprocess.Popen[bytes]", collectives: Collectives) -> None:
    process.wait()
    collectives.abort()


def _raise_cause(failures: list[Failure]) -> None:
    """Of several failures one is the cause of the others."""
    cause = min(failures, key=lambda failure: failure.lost_peer)
    error = WorkerError(f"{cause.what}\nAll ranks of this engine have been ended")
    if cause.user_error is not None:
        raise cause.user_error from error
    raise error
