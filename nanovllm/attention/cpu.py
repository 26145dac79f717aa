"""Paged attention on a CPU: the C++ kernel in cpu_paged_attention.cpp, which explains its method and cache layout."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import AttentionBackend, AttentionSpec
from nanovllm.layers.cpu_layers import fuse_layers
from nanovllm.models.cpu_decoder import use_whole_layers
from nanovllm.utils.context import AttentionMetadata
from nanovllm.utils.cpu_build import BuildError, load_kernels

TILE = 16  # tokens of a tile of K and V
MAX_HEAD_DIM = 256


class CPUBackend(AttentionBackend):
    """One kernel for prefill chunks and decodes; a row's result is the same, bit for bit, whatever else is in the batch."""

    HAS_PRODUCTS: ClassVar[bool] = True
    DEFAULT_BLOCK_SIZE: ClassVar[int] = 32  # AMX weighs V of as many tokens at once

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self._kernels = load_kernels()

    @staticmethod
    def why_not(spec: AttentionSpec) -> str | None:
        """The shapes that the kernel takes, and a compiler to build it."""
        if spec.device.type != "cpu":
            return f"it is for device cpu, not {spec.device.type}"
        if spec.head_dim % TILE or spec.head_dim > MAX_HEAD_DIM:
            return f"head_dim must be a multiple of {TILE} up to {MAX_HEAD_DIM}, not {spec.head_dim}"
        if spec.block_size % TILE:
            return f"the block size must be a multiple of {TILE}, not {spec.block_size}"
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} heads cannot share {spec.num_kv_heads} KV heads evenly"
        try:
            load_kernels()
        except BuildError as error:
            return str(error)
        return None

    def fuse_layers(self, model: nn.Module) -> None:
        """See `AttentionBackend.fuse_layers`."""
        fuse_layers(model, self._kernels)
        if not self.spec.batch_invariant:  # where something may be done around each product
            use_whole_layers(model, self._kernels, self.scale)

    def allocate_cache(self, num_blocks: int) -> Tensor:
        """[num_blocks, num_kv_heads, 2 (K, V), block_size / 16, 16 * head_dim]: tiles, laid out inside by the kernel."""
        spec = self.spec
        shape = (num_blocks, spec.num_kv_heads, 2, spec.block_size // TILE, TILE * spec.head_dim)
        cache: Tensor = self._kernels.empty_lasting(shape, spec.dtype)
        return cache

    def get_memory(self, kv_cache: list[Tensor], first_block: int, end_block: int, in_large_pages: bool) -> None:
        """See `AttentionBackend.get_memory`."""
        self._kernels.populate(kv_cache, first_block, end_block, in_large_pages)

    def store(self, k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        """See `AttentionBackend.store`."""
        self._kernels.store(k, v, cache, slot_mapping)

    def attend(self, q: Tensor, cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See `AttentionBackend.attend`."""
        out = torch.empty(q.shape, dtype=q.dtype)
        lengths = metadata.cu_seqlens_q, metadata.context_lens, metadata.block_tables
        self._kernels.attend(q, cache, out, *lengths, self.scale)
        return out
