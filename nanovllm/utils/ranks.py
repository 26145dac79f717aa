"""Ranks: who shares a layer with whom, and the collectives between them.

A layer asks for its `Ranks` when it is made and calls the collectives where the mathematics needs them; with one rank they
return their argument. More ranks need processes and a torch.distributed group behind the same methods, nothing else.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank's place among `size` ranks that share a model (tensor parallelism)."""

    rank: int = 0
    size: int = 1

    def shard(self, total: int, name: str) -> int:
        """The size of one rank's share of `total`.

        Raises:
            ValueError: `total` does not divide by the number of ranks.
        """
        if total % self.size:
            raise ValueError(f"{name} is {total}, which does not divide by tensor_parallel_size {self.size}")
        return total // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, on every rank."""
        assert self.size == 1, "collectives of several ranks are not connected"
        return x

    def gather_last_dim(self, x: Tensor) -> Tensor:
        """The ranks' `x` side by side along the last dimension."""
        assert self.size == 1, "collectives of several ranks are not connected"
        return x
