"""Attention in plain PyTorch, for any device: slow, obviously right, the oracle of every test.

Cache of one layer: [2 (K, V), num_blocks, block_size, num_kv_heads, head_dim].
"""

import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, AttentionSpec
from nanovllm.utils.context import AttentionMetadata

MAX_QUERIES = 512  # queries scored at a time: bounds the score matrix whatever the length of a prompt


class TorchReferenceBackend(AttentionBackend):
    """Sequence by sequence: gather its K and V, score, mask, softmax, all in float32."""

    @staticmethod
    def why_not(spec: AttentionSpec) -> str | None:
        """It can serve everything, but sums in an order of its own for every shape."""
        return "its sums depend on the number of queries; batch_invariant needs fixed ones" if spec.batch_invariant else None

    def allocate_cache(self, num_blocks: int) -> Tensor:
        """[2, num_blocks, block_size, num_kv_heads, head_dim]."""
        spec = self.spec
        shape = (2, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return torch.empty(shape, dtype=spec.dtype, device=spec.device)

    def store(self, k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        """See `AttentionBackend.store`."""
        slots = cache.flatten(1, 2)  # [2, num_slots, num_kv_heads, head_dim], a view
        written = slot_mapping >= 0
        slots[0, slot_mapping[written]] = k[written]
        slots[1, slot_mapping[written]] = v[written]

    def attend(self, q: Tensor, cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See `AttentionBackend.attend`."""
        out = torch.empty_like(q)
        starts = metadata.cu_seqlens_q.tolist()
        for index, context_len in enumerate(metadata.context_lens.tolist()):
            start, end = starts[index], starts[index + 1]
            num_blocks = -(-context_len // self.spec.block_size)
            blocks = metadata.block_tables[index, :num_blocks]
            # Cut to the context: what lies behind it was never written. [context_len, num_kv_heads, head_dim]
            k, v = cache[:, blocks].flatten(1, 2)[:, :context_len].float()
            for first in range(start, end, MAX_QUERIES):
                last = min(first + MAX_QUERIES, end)
                out[first:last] = self._attend_one(q[first:last], k, v, context_len - (end - first))
        return out

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor, first_position: int) -> Tensor:
        """Attend with consecutive queries of one sequence, the first at position `first_position`.

        q [queries, num_heads, head_dim], k and v [context_len, num_kv_heads, head_dim] -> the shape of q.
        """
        num_queries, num_heads, head_dim = q.shape
        context_len, num_kv_heads, _ = k.shape
        # Query heads that share a K and V head lie together: [num_kv_heads, group, queries, head_dim].
        q = q.float().view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)
        scores = q @ k.permute(1, 2, 0).unsqueeze(1) * self.scale  # [num_kv_heads, group, queries, context_len]
        positions = torch.arange(first_position, first_position + num_queries, device=q.device)
        future = torch.arange(context_len, device=q.device) > positions[:, None]
        scores.masked_fill_(future, float("-inf"))
        out = scores.softmax(dim=-1) @ v.transpose(0, 1).unsqueeze(1)  # [num_kv_heads, group, queries, head_dim]
        return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
