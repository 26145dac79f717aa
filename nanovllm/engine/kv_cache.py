"""The KV cache: how many blocks it has, and its memory.

The cache is one tensor a layer, in the attention backend's layout. Its memory is not initialised: the operating system
gives pages when they are first written.
"""

import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, AttentionSpec
from nanovllm.config import EngineConfig
from nanovllm.utils.memory import available_host_memory

GIB = 2**30
SHARE_OF_HOST_MEMORY = 0.5  # of what is free once the weights are loaded; the rest is for activations and for others


def decide_num_blocks(config: EngineConfig, spec: AttentionSpec, num_layers: int, max_model_len: int) -> int:
    """How many blocks to allocate: as configured, else what memory allows and the work can use.

    Raises:
        ValueError: not even one block fits.
    """
    if config.num_kvcache_blocks is not None:
        return config.num_kvcache_blocks
    useful = config.max_num_seqs * -(-max_model_len // spec.block_size)
    bytes_per_block = spec.bytes_per_block * num_layers
    memory = _memory_budget(config, spec.device)
    num_blocks = min(useful, memory // bytes_per_block)
    if num_blocks < 1:
        raise ValueError(
            f"no memory for the KV cache: {memory} bytes are available, one block of {spec.block_size} tokens needs "
            f"{bytes_per_block}; raise {'kvcache_memory_gb' if spec.device.type == 'cpu' else 'gpu_memory_utilization'}"
        )
    return num_blocks


def _memory_budget(config: EngineConfig, device: torch.device) -> int:
    if config.kvcache_memory_gb is not None:
        return int(config.kvcache_memory_gb * GIB) // config.tensor_parallel_size
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(total * config.gpu_memory_utilization) - (total - free))
    return int(available_host_memory() * SHARE_OF_HOST_MEMORY) // config.tensor_parallel_size


def allocate_kv_cache(backend: AttentionBackend, num_layers: int, num_blocks: int) -> list[Tensor]:
    """The cache of every layer."""
    return [backend.allocate_cache(num_blocks) for _ in range(num_layers)]
