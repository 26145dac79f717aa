"""Attention with the flash-attn package (Dao 2023, "FlashAttention-2"): NVIDIA GPUs from Ampere on.

Cache of one layer: [2 (K, V), num_blocks, block_size, num_kv_heads, head_dim]; blocks of a multiple of 256 tokens, as the
package wants them. It attends only: K and V are written by our own store kernel, which is Triton's.
"""

from importlib import import_module
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.attention.backend import AttentionSpec
from nanovllm.attention.triton import TritonBackend
from nanovllm.utils.context import AttentionMetadata

BLOCK_SIZE_UNIT = 256
MAX_HEAD_DIM = 256
AMPERE = (8, 0)  # compute capability


class FlashAttnBackend(TritonBackend):
    """Decodes go to `flash_attn_with_kvcache`, which splits long contexts; any other batch to `flash_attn_varlen_func`."""

    DEFAULT_BLOCK_SIZE: ClassVar[int] = BLOCK_SIZE_UNIT
    CAN_CAPTURE_CHUNKS: ClassVar[bool] = False  # its grid would be as large as if every query were the longest

    @staticmethod
    def why_not(spec: AttentionSpec) -> str | None:
        """It needs the package, a GPU from Ampere on, 16-bit dtypes and large blocks."""
        if spec.batch_invariant:
            return "flash-attn splits a context as the batch leaves room for; batch_invariant needs fixed splits"
        if spec.device.type != "cuda" or torch.version.hip is not None:
            return "flash-attn needs an NVIDIA GPU"
        capability = torch.cuda.get_device_capability(spec.device)
        if capability < AMPERE:
            return f"flash-attn needs compute capability 8.0 (Ampere), this GPU has {capability[0]}.{capability[1]}"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"flash-attn computes in float16 and bfloat16, the model's dtype is {spec.dtype}"
        if spec.block_size % BLOCK_SIZE_UNIT:
            return f"flash-attn needs a kvcache_block_size that is a multiple of {BLOCK_SIZE_UNIT}, got {spec.block_size}"
        if spec.head_dim % 8 or spec.head_dim > MAX_HEAD_DIM:
            return f"flash-attn takes head sizes that are multiples of 8 up to {MAX_HEAD_DIM}, got {spec.head_dim}"
        try:
            import_module("flash_attn")
        except ImportError as error:  # not there, or built for another torch
            return f"flash-attn cannot be imported ({error}); pip install flash-attn --no-build-isolation"
        return TritonBackend.why_not(spec)

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self._flash_attn = import_module("flash_attn")

    def attend(self, q: Tensor, cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See `AttentionBackend.attend`."""
        k, v = cache.unbind(0)
        if metadata.max_seqlen_q == 1:
            out = self._flash_attn.flash_attn_with_kvcache(
                q.unsqueeze(1),  # [num_seqs, 1, num_heads, head_dim]
                k,
                v,
                cache_seqlens=metadata.context_lens,
                block_table=metadata.block_tables,
                softmax_scale=self.scale,
                causal=True,
            )
            return out.squeeze(1)
        return self._flash_attn.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=F.pad(metadata.context_lens.cumsum(0, dtype=torch.int32), (1, 0)),
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=metadata.max_context_len,
            softmax_scale=self.scale,
            causal=True,
            block_table=metadata.block_tables,
        )
