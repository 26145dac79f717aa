"""Collectives: the torch.distributed group of one engine's ranks, NCCL on GPUs, gloo on CPUs.

The group is the engine's own. torch's default group, of which a process has one, is neither needed nor touched, so that
engines stand side by side. The ranks find each other through a store in anonymous memory, a file descriptor that workers
inherit: no port is chosen, no file is named, nothing can be left behind, and no other user can read it. gloo's own
sockets listen on the loopback interface, on ports that the kernel chooses when they are bound.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CONNECT_TIMEOUT = timedelta(seconds=8)  # all ranks are waiting for this moment, so that it is short
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # the longest that ranks may be apart; a rank that dies is noticed at once


class PeerLostError(RuntimeError):
    """A collective failed: another rank has gone. Why is for whoever started it to say."""


class Collectives:
    """This rank's end of the group. Creating one waits for the others.

    Args:
        rank, size: this rank, and how many there are.
        device: where the tensors are.
        store_fd: an empty anonymous file, the same on every rank; `close` closes it.
        check_peers: raises if another rank is known to have failed.

    Raises:
        PeerLostError: another rank did not come.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, store_fd: int, check_peers: Callable[[], None] = lambda: None
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.check_peers = check_peers
        self._store_fd: int | None = store_fd
        self._group: Any = None
        connect = _connect_nccl if device.type == "cuda" else _connect_gloo
        try:
            self._group = connect(f"/proc/self/fd/{store_fd}", rank, size)
            self.minimum(0)  # NCCL connects at the first collective
        except RuntimeError as error:
            reason = str(error)
        else:
            return
        self.close()  # not while the traceback's frames keep the store alive: see there
        raise PeerLostError(f"rank {rank} could not reach the other ranks: {reason}")

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, on every rank, in place where `x` is contiguous."""
        return self._all_reduce(x.contiguous(), dist.ReduceOp.SUM)

    def minimum(self, value: int) -> int:
        """The least of the ranks' values, on every rank."""
        return int(self._all_reduce(torch.tensor([value], device=self.device), dist.ReduceOp.MIN).item())

    def gather_last_dim(self, x: Tensor) -> Tensor:
        """On rank 0 the ranks' `x` side by side; elsewhere `x`."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        options.timeout = COLLECTIVE_TIMEOUT
        self._wait(lambda: self._group.gather([parts] if parts else [], [x], options))
        return torch.cat(parts, dim=-1) if parts else x

    def abort(self) -> None:
        """End the collectives under way on this rank; they raise, or leave nonsense. Callable from any thread."""
        group = self._group
        if group is not None:
            group.abort()

    def close(self) -> None:
        """Leave the group. May be called twice."""
        if self._store_fd is not None:
            if self.device.type == "cuda":  # else NCCL would take leave of ranks that may have gone
                self.abort()
            self._group = None  # first: a FileStore opens its path once more when it is destroyed
            os.close(self._store_fd)
            self._store_fd = None

    def _all_reduce(self, x: Tensor, operation: Any) -> Tensor:
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        options.timeout = COLLECTIVE_TIMEOUT
        self._wait(lambda: self._group.allreduce([x], options))
        return x

    def _wait(self, start: Callable[[], Any]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise PeerLostError(f"rank {self.rank} lost another rank: {error}") from error


def _connect_gloo(path: str, rank: int, size: int) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = CONNECT_TIMEOUT
    return gloo(_make_store(path, size), rank, size, options)


def _connect_nccl(path: str, rank: int, size: int) -> Any:
    nccl: Any = dist.ProcessGroupNCCL
    return nccl(_make_store(path, size), rank, size, nccl.Options())


def _make_store(path: str, size: int) -> Any:
    store: Any = dist.FileStore(path, size)  # type: ignore[attr-defined] # missing in torch's stubs
    store.set_timeout(CONNECT_TIMEOUT)
    return store
