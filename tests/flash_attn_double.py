"""A stand-in for the flash-attn package: its signatures and its rules (2.6 and later), computing by the plain backend."""

import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionSpec
from nanovllm.attention.torch_reference import TorchReferenceBackend
from nanovllm.utils.context import AttentionMetadata


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert dropout_p == 0.0
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    assert max_seqlen_q >= cu_seqlens_q.diff().max()
    assert max_seqlen_k >= cu_seqlens_k.diff().max()
    assert cu_seqlens_q[-1] == len(q)
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), block_table, softmax_scale)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    assert causal
    assert cache_seqlens is not None
    batch_size, seqlen, num_heads, head_dim = q.shape
    starts = torch.arange(batch_size + 1, dtype=torch.int32) * seqlen
    out = _attend(q.reshape(-1, num_heads, head_dim), k_cache, v_cache, starts, cache_seqlens, block_table, softmax_scale)
    return out.view(q.shape)


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    block_table: Tensor | None,
    scale: float | None,
) -> Tensor:
    assert block_table is not None
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    assert block_size % 256 == 0, "paged blocks are a multiple of 256"
    assert block_table.dtype == context_lens.dtype == torch.int32
    assert len(block_table) == len(context_lens) == len(cu_seqlens_q) - 1
    assert k_cache.stride(-1) == v_cache.stride(-1) == block_table.stride(-1) == q.stride(-1) == 1
    assert q.dtype == k_cache.dtype == v_cache.dtype
    backend = TorchReferenceBackend(AttentionSpec(q.shape[1], num_kv_heads, head_dim, block_size, q.dtype, q.device))
    if scale is not None:
        backend.scale = scale
    metadata = AttentionMetadata(
        cu_seqlens_q=cu_seqlens_q,
        context_lens=context_lens,
        block_tables=block_table,
        slot_mapping=context_lens,  # not looked at
        max_seqlen_q=int(cu_seqlens_q.diff().max()),
        max_context_len=int(context_lens.max()),
    )
    return backend.attend(q, torch.stack((k_cache, v_cache)), metadata)
