"""Ranks: who shares a layer with whom, which part of a weight is whose, and the collectives between them.

A layer asks for its `Ranks` when it is made and calls the collectives where the mathematics needs them; with one rank they
return their argument. How ranks reach each other is `Collectives`' concern.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.utils.collectives import Collectives


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of one dimension of a weight: spans of the whole, in order, then padding, which is zero."""

    total: int  # the whole dimension, as in the checkpoint
    size: int  # of this rank's parameter, the same on every rank
    spans: tuple[tuple[int, int], ...]  # (begin, end) in the whole; none is empty


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank's place among `size` ranks that share a model (tensor parallelism).

    Args:
        rank: 0 is the caller's process.
        size: how many share the model.
        collectives: the way to the others; None with one rank, or where nothing is computed.
    """

    rank: int = 0
    size: int = 1
    collectives: Collectives | None = None

    # ---- what is whose ----

    def shard(self, total: int) -> Shard:
        """An equal, consecutive share of `total`; where it does not divide, the last ranks have less, and padding."""
        size = -(-total // self.size)
        begin, end = (min(rank * size, total) for rank in (self.rank, self.rank + 1))
        return Shard(total, size, ((begin, end),) if begin < end else ())

    def num_heads(self, num_heads: int) -> int:
        """Query heads of each rank.

        Raises:
            ValueError: `num_heads` does not divide by the number of ranks.
        """
        if num_heads % self.size:
            sizes = ", ".join(str(size) for size in range(1, num_heads + 1) if num_heads % size == 0)
            raise ValueError(
                f"tensor_parallel_size is {self.size}, which does not divide the model's {num_heads} attention heads; "
                f"{sizes} would"
            )
        return num_heads // self.size

    def kv_heads(self, num_heads: int, num_kv_heads: int) -> list[int]:
        """The K and V heads that this rank's query heads attend to, equally many query heads to each.

        With fewer of them than ranks, ranks have copies. Where a rank's query heads would be spread unevenly over K and
        V heads (7 ranks with 2 of 14 query heads each, 7 to a K and V head), each of them gets a K and V head of its own.
        """
        mine, group = self.num_heads(num_heads), num_heads // num_kv_heads
        step = group if mine % group == 0 else mine if group % mine == 0 else 1
        return [head // group for head in range(self.rank * mine, (self.rank + 1) * mine, step)]

    def shard_kv(self, num_heads: int, num_kv_heads: int, head_dim: int) -> Shard:
        """The share of a K or V projection's outputs: those of `kv_heads`."""
        heads = self.kv_heads(num_heads, num_kv_heads)
        spans: list[tuple[int, int]] = []
        for head in heads:
            begin, end = head * head_dim, (head + 1) * head_dim
            if spans and spans[-1][1] == begin:
                begin = spans.pop()[0]
            spans.append((begin, end))
        return Shard(num_kv_heads * head_dim, len(heads) * head_dim, tuple(spans))

    def place(self, device: torch.device) -> torch.device:
        """The rank's own device: several ranks take consecutive GPUs, beginning with `device`.

        Raises:
            ValueError: there are not enough.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        first, count = device.index or 0, torch.cuda.device_count()
        if first + self.size > count:
            raise ValueError(
                f"tensor_parallel_size is {self.size}, but this machine has {count - first} GPUs from cuda:{first} on. "
                f"Tensor parallelism does not reach over machines; run one engine on each instead, such as with Ray"
            )
        return torch.device("cuda", first + self.rank)

    # ---- collectives: every rank calls them, in the same order ----

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, on every rank. May be made in `x`."""
        return x if self.size == 1 else self._connected().all_reduce(x)

    def gather_last_dim(self, x: Tensor) -> Tensor:
        """On rank 0 the ranks' `x` side by side along the last dimension; elsewhere `x`, for nobody to use."""
        return x if self.size == 1 else self._connected().gather_last_dim(x)

    def minimum(self, value: int) -> int:
        """The least of the ranks' values, on every rank."""
        return value if self.size == 1 else self._connected().minimum(value)

    def check_peers(self) -> None:
        """In long work without collectives: raise if another rank is known to have failed."""
        if self.collectives is not None:
            self.collectives.check_peers()

    def _connected(self) -> Collectives:
        assert self.collectives is not None, "collectives of several ranks are not connected"
        return self.collectives
