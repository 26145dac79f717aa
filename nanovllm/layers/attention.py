"""The attention layer: what the models call; the work is the backend's."""

from torch import Tensor, nn

from nanovllm.utils.context import get_forward_context


class Attention(nn.Module):
    """Causal attention of this step's tokens over the paged KV cache of one layer."""

    def __init__(self, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store K and V, then attend.

        q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim] -> the shape of q.
        """
        context = get_forward_context()
        cache = context.kv_cache[self.layer_index]
        context.backend.store(k, v, cache, context.metadata.slot_mapping)
        return context.backend.attend(q, cache, context.metadata)
