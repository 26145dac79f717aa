"""Linear layers whose weights are divided among ranks (Shoeybi et al. 2019, "Megatron-LM").

Column parallel: each rank has some of the outputs, no communication. Row parallel: each rank has some of the inputs, the
results are summed over the ranks. Projections that read the same input are merged into one matrix product.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nanovllm.layers.packed_weight import linear, pack_weight
from nanovllm.utils.loader import CheckpointTensor, copy_slice
from nanovllm.utils.ranks import Ranks, Shard


class ParallelLinear(nn.Module):
    """What the linear layers share: weight, bias, and the product.

    Args:
        input_size, output_size: of this rank's part.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool) -> None:
        super().__init__()
        self.output_size = output_size
        self.weight = nn.Parameter(torch.empty(output_size, input_size))
        self.bias = nn.Parameter(torch.empty(output_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, input_size] -> [num_tokens, output_size]."""
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[num_tokens, input_size] -> [num_tokens, output_size], of this rank's part."""
        return linear(x, self.weight, bias)

    def pack(self) -> None:
        """See `Packable`."""
        pack_weight(self)


class ColumnParallelLinear(ParallelLinear):
    """Projections of one input, merged, each divided among the ranks by output.

    Args:
        input_size: columns of the weight.
        outputs: the name of each projection and its rows, over all ranks; or this rank's share, if it is not an equal one.
        bias: whether each has a bias.
        ranks: who shares the layer.
    """

    def __init__(self, input_size: int, outputs: Mapping[str, int | Shard], bias: bool, ranks: Ranks) -> None:
        self.shards = {part: ranks.shard(rows) if isinstance(rows, int) else rows for part, rows in outputs.items()}
        self.sizes = [shard.size for shard in self.shards.values()]
        super().__init__(input_size, sum(self.sizes), bias)
        self.parts = tuple(outputs)

    def forward_split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[num_tokens, input_size] -> one [num_tokens, size] for each projection."""
        return self(x).split(self.sizes, dim=-1)

    def load_part(self, name: str, tensor: CheckpointTensor, part: str) -> None:
        """See `LoadsParts`."""
        index = self.parts.index(part)
        start = sum(self.sizes[:index])
        target = self.get_parameter(name)[start : start + self.sizes[index]]
        copy_slice(target, tensor, 0, self.shards[part])


class RowParallelLinear(ParallelLinear):
    """A projection divided among the ranks by input; their results are summed, and the bias is added once."""

    parts = ("",)

    def __init__(self, input_size: int, output_size: int, bias: bool, ranks: Ranks) -> None:
        self.shard = ranks.shard(input_size)
        super().__init__(self.shard.size, output_size, bias)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, this rank's part of input_size] -> [num_tokens, output_size]."""
        return self.ranks.all_reduce(self.multiply(x, self.bias if self.ranks.rank == 0 else None))

    def load_part(self, name: str, tensor: CheckpointTensor, part: str) -> None:
        """See `LoadsParts`. The bias is whole on every rank."""
        if name == "bias":
            copy_slice(self.get_parameter(name), tensor)
        else:
            copy_slice(self.get_parameter(name), tensor, 1, self.shard)
