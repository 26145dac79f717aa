"""Attention with our own Triton kernels: any GPU, any block size, and the CPU in Triton's interpreter.

Cache of one layer: [2 (K, V), num_blocks, block_size, num_kv_heads, head_dim]. What is here chooses tile sizes and grids;
the work is in `triton_kernels`.
"""

import math
import os
from importlib import import_module
from importlib.util import find_spec
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import AttentionBackend, AttentionSpec
from nanovllm.utils.context import AttentionMetadata

PART = 512  # tokens of a context that are attended to on their own in decode, at least
MAX_PARTS = 32  # of the longest context: each has memory for its result, for every sequence
TARGET_PROGRAMS = 4096  # of a decode: enough to keep a large GPU evenly busy; below it, contexts are split
MAX_HEAD_DIM = 256


class Tiles(NamedTuple):
    """Sizes of a kernel's tiles, and how Triton is to compile it."""

    block_m: int  # rows of queries: (token, head) pairs
    block_n: int  # tokens of the context
    num_warps: int
    num_stages: int


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def prefill_tiles(group: int, head_dim: int, itemsize: int) -> Tiles:
    """For queries of several tokens: what was fastest on an H100 for heads of 128 in 16 bits, made to stay in registers."""
    block_m = max(64 if itemsize == 2 else 32, next_power_of_two(group))
    row_bytes = next_power_of_two(head_dim) * itemsize
    return Tiles(block_m, max(32, min(64, 8192 // row_bytes)), num_warps=8 if row_bytes > 256 else 4, num_stages=2)


def decode_tiles(group: int, head_dim: int, itemsize: int) -> Tiles:
    """For queries of one token; 16 rows are the least that a matrix product takes."""
    row_bytes = next_power_of_two(head_dim) * itemsize
    # Tokens whose K takes 16 KiB of shared memory, so that two stages of K and V take 64 KiB: all that some GPUs have.
    block_n = max(16, min(64, 16384 // row_bytes))
    return Tiles(max(16, next_power_of_two(group)), block_n, num_warps=4, num_stages=2)


class TritonBackend(AttentionBackend):
    """Long queries and queries of one token go to a kernel each, in whatever mixture a batch has them."""

    CAN_CAPTURE_DECODES: ClassVar[bool] = True
    CAN_CAPTURE_CHUNKS: ClassVar[bool] = True

    @staticmethod
    def why_not(spec: AttentionSpec) -> str | None:
        """It needs Triton, and a GPU or Triton's interpreter."""
        if find_spec("triton") is None:
            return "triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if spec.device.type == "cpu" and not interpreted:
            return "Triton compiles for GPUs; TRITON_INTERPRET=1 in the environment runs it on a CPU, slowly"
        if interpreted and spec.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies the bits of bfloat16 as integers; use dtype float32 or float16"
        if spec.head_dim > MAX_HEAD_DIM:
            return f"heads have {spec.head_dim} dimensions, its tiles hold {MAX_HEAD_DIM} at most"
        return None

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self._kernels = import_module("nanovllm.attention.triton_kernels")
        self._group = spec.num_heads // spec.num_kv_heads
        self._token_stride = spec.num_kv_heads * spec.head_dim
        self._layout = {
            "GROUP": self._group,
            "BLOCK_SIZE": spec.block_size,
            "TOKEN_STRIDE": self._token_stride,
            "HEAD_DIM": spec.head_dim,
            "BLOCK_D": max(16, next_power_of_two(spec.head_dim)),
        }
        self._scale = self.scale * math.log2(math.e)
        self._part = max(PART, next_power_of_two(-(-spec.max_context_len // MAX_PARTS)))

    def fuse_layers(self, model: nn.Module) -> None:
        """See `AttentionBackend.fuse_layers`."""
        import_module("nanovllm.layers.triton_layers").fuse_layers(model)

    def allocate_cache(self, num_blocks: int) -> Tensor:
        """[2, num_blocks, block_size, num_kv_heads, head_dim]."""
        spec = self.spec
        shape = (2, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return torch.empty(shape, dtype=spec.dtype, device=spec.device)

    def store(self, k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        """See `AttentionBackend.store`."""
        k, v = k.flatten(1), v.flatten(1)  # a view of part of a merged projection stays one
        self._kernels.store_kvcache_kernel[(len(k),)](
            k,
            v,
            cache,
            slot_mapping,
            k.stride(0),
            v.stride(0),
            cache.stride(0),
            TOKEN_STRIDE=self._token_stride,
            BLOCK=next_power_of_two(self._token_stride),
        )

    def attend(self, q: Tensor, cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See `AttentionBackend.attend`."""
        q = q.contiguous()
        out = torch.empty_like(q)
        if self.spec.batch_invariant:  # the two kernels' sums differ: a token may be computed in a chunk or on its own
            self._prefill(q, out, cache, metadata, min_queries=1)
            return out
        if metadata.max_seqlen_q > 1:
            self._prefill(q, out, cache, metadata, min_queries=2)
        self._decode(q, out, cache, metadata)
        return out

    def _prefill(self, q: Tensor, out: Tensor, cache: Tensor, metadata: AttentionMetadata, min_queries: int) -> None:
        """Attend with all queries of at least so many tokens."""
        tiles = prefill_tiles(self._group, self.spec.head_dim, self.spec.dtype.itemsize)
        num_seqs = len(metadata.context_lens)
        num_tiles = len(q) * self._group // tiles.block_m + num_seqs  # at most: see `_first_tile` in the kernels
        self._kernels.prefill_kernel[(num_tiles, self.spec.num_kv_heads)](
            q,
            out,
            cache,
            metadata.cu_seqlens_q,
            metadata.context_lens,
            metadata.block_tables,
            metadata.block_tables.stride(0),
            cache.stride(0),
            num_seqs,
            self._scale,
            min_queries,
            **self._layout,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )

    def _decode(self, q: Tensor, out: Tensor, cache: Tensor, metadata: AttentionMetadata) -> None:
        """Attend with all queries of one token."""
        spec, num_seqs = self.spec, len(metadata.context_lens)
        tiles = decode_tiles(self._group, spec.head_dim, spec.dtype.itemsize)
        max_parts = -(-metadata.max_context_len // self._part)
        num_splits = min(max_parts, -(-TARGET_PROGRAMS // (num_seqs * spec.num_kv_heads)))
        lse = torch.empty(num_seqs, spec.num_heads, max_parts, dtype=torch.float32, device=q.device)
        partial = torch.empty(*lse.shape, spec.head_dim, dtype=torch.float32, device=q.device)
        self._kernels.decode_kernel[(num_seqs, spec.num_kv_heads, num_splits)](
            q,
            partial,
            lse,
            cache,
            metadata.cu_seqlens_q,
            metadata.context_lens,
            metadata.block_tables,
            metadata.block_tables.stride(0),
            cache.stride(0),
            max_parts,
            self._scale,
            PART=self._part,
            **self._layout,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        self._kernels.merge_kernel[(num_seqs, spec.num_heads)](
            partial,
            lse,
            out,
            metadata.cu_seqlens_q,
            metadata.context_lens,
            max_parts,
            PART=self._part,
            HEAD_DIM=spec.head_dim,
            BLOCK_D=self._layout["BLOCK_D"],
        )
