"""The token embedding and the language-model head, their vocabulary divided among the ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.packed_weight import linear, pack_weight
from nanovllm.utils.loader import CheckpointTensor, copy_slice
from nanovllm.utils.ranks import Ranks


class VocabParallelEmbedding(nn.Module):
    """A table of token embeddings; each rank has a consecutive part of the vocabulary."""

    parts = ("",)

    def __init__(self, vocab_size: int, hidden_size: int, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.shard = ranks.shard(vocab_size)
        self.output_size = self.shard.size  # of this rank's part, where it is multiplied with
        self.weight = nn.Parameter(torch.empty(self.shard.size, hidden_size))

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 [num_tokens] -> [num_tokens, hidden_size]."""
        if self.ranks.size == 1:
            return self.look_up(token_ids)
        local = token_ids - self.ranks.rank * self.shard.size
        mine = (local >= 0) & (local < self.shard.size)
        embedded = self.look_up(local.where(mine, 0)) * mine.unsqueeze(-1)
        return self.ranks.all_reduce(embedded)

    def look_up(self, token_ids: Tensor) -> Tensor:
        """int64 [num_tokens] -> [num_tokens, hidden_size], of this rank's part of the table."""
        return F.embedding(token_ids, self.weight)

    def load_part(self, name: str, tensor: CheckpointTensor, part: str) -> None:
        """See `LoadsParts`."""
        copy_slice(self.weight, tensor, 0, self.shard)


class ParallelLMHead(VocabParallelEmbedding):
    """The projection from hidden states to logits; its weight is laid out, and may be shared, as the embedding's."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[num_rows, hidden_size] -> logits [num_rows, vocab_size] on rank 0; on others nothing of use."""
        logits = self.ranks.gather_last_dim(self.multiply(hidden_states))
        return logits[:, : self.shard.total]  # what is cut off belongs to the padding

    def multiply(self, hidden_states: Tensor) -> Tensor:
        """[num_rows, hidden_size] -> [num_rows, output_size], of this rank's part of the vocabulary."""
        return linear(hidden_states, self.weight)

    def pack(self) -> None:
        """See `Packable`."""
        pack_weight(self)
