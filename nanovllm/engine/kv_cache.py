"""The KV cache: how many blocks it has, and its memory.

The cache is one tensor a layer, in the attention backend's layout. Its memory is not initialised: on a CPU the operating
system gives it in portions, as far as blocks are used.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, AttentionSpec
from nanovllm.config import EngineConfig
from nanovllm.utils.memory import available_host_memory

GIB = 2**30
PORTION = 2**26  # bytes that are got from the operating system at once; more where that is not a large page for each layer
LARGE_PAGE = 2**21  # bytes
SLOW_PAGES = 0.4  # seconds for a GiB of large pages; one thread clears one in 0.1 s, and asks a host for one in 2 s
WORTH_SMALL_PAGES = 3  # times as fast as large ones they have to be got
SHARE_OF_HOST_MEMORY = 0.5  # of what is free once the weights are loaded; the rest is for activations and for others


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """What is known of a GPU's memory before the KV cache is made, in bytes."""

    total: int  # of the card
    free: int  # of the card now
    held: int  # by our allocator now, used or not: part of what is not free
    peak: int  # the most that our allocator held during a step of the largest batch
    captured: int = 0  # what captured steps will keep for themselves


def gpu_kv_cache_bytes(memory: GpuMemory, utilization: float) -> int:
    """Bytes for the KV cache: the share of the card that may be used, less what steps and all others hold.

    The others are whatever is in use but not our allocator's: other processes, and libraries beside it in this one.

    Raises:
        ValueError: nothing is left.
    """
    usable = math.floor(memory.total * utilization)
    others = memory.total - memory.free - memory.held
    ours = max(memory.peak, memory.held) + memory.captured
    left = usable - others - ours
    if left <= 0:
        raise ValueError(
            f"no GPU memory is left for the KV cache: gpu_memory_utilization={utilization} of {memory.total / GIB:.2f} GiB "
            f"is {usable / GIB:.2f} GiB; weights and the largest step need {ours / GIB:.2f} GiB, "
            f"others hold {others / GIB:.2f} GiB. Raise gpu_memory_utilization, lower max_num_batched_tokens or "
            f"max_num_seqs, or free the GPU"
        )
    return left


def measure_gpu_memory(device: torch.device, largest_step: Callable[[], int]) -> GpuMemory:
    """Run the largest step once and see what it takes. It returns what captured steps will keep."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    captured = largest_step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(total, free, torch.cuda.memory_reserved(device), peak, captured)


def decide_num_blocks(
    config: EngineConfig,
    spec: AttentionSpec,
    num_layers: int,
    max_model_len: int,
    largest_step: Callable[[], int],
) -> int:
    """How many blocks to allocate: as configured, else what memory allows and the work can use.

    Args:
        largest_step: computes a step of the largest batch and returns what captured steps will keep, in bytes; called where
            its use of memory has to be known.

    Raises:
        ValueError: not even one block fits.
    """
    if config.num_kvcache_blocks is not None:
        return config.num_kvcache_blocks
    useful = config.max_num_seqs * -(-max_model_len // spec.block_size)
    bytes_per_block = spec.bytes_per_block * num_layers
    memory = _memory_budget(config, spec.device, largest_step)
    num_blocks = min(useful, memory // bytes_per_block)
    if num_blocks < 1:
        raise ValueError(
            f"no memory for the KV cache: {memory} bytes are available, one block of {spec.block_size} tokens needs "
            f"{bytes_per_block}; raise {'kvcache_memory_gb' if spec.device.type == 'cpu' else 'gpu_memory_utilization'}"
        )
    return num_blocks


def _memory_budget(config: EngineConfig, device: torch.device, largest_step: Callable[[], int]) -> int:
    if config.kvcache_memory_gb is not None:
        return int(config.kvcache_memory_gb * GIB) // config.tensor_parallel_size
    if device.type == "cuda":
        return gpu_kv_cache_bytes(measure_gpu_memory(device, largest_step), config.gpu_memory_utilization)
    return int(available_host_memory() * SHARE_OF_HOST_MEMORY) // config.tensor_parallel_size


def allocate_kv_cache(backend: AttentionBackend, num_layers: int, num_blocks: int) -> list[Tensor]:
    """The cache of every layer."""
    return [backend.allocate_cache(num_blocks) for _ in range(num_layers)]


class BlockMemory:
    """Gets the memory of blocks before they are written, a portion at a time: the first at once.

    A page that is written for the first time has to be found and cleared by the operating system. In the middle of a step,
    where one thread would do it while the others wait, it took a tenth of the time of a run of a minute.

    Steps run fastest in large pages, by a few per cent of their attention. But a virtual machine that gives memory which is
    free back to its host has to ask for large pages again, at up to twenty times their price, and may have enough small ones
    at hand. Where large pages are slow, small ones are tried, and taken for as long as they are much faster.

    Args:
        backend: whose cache it is.
        kv_cache: the cache of every layer.
        num_blocks: of each.
    """

    def __init__(self, backend: AttentionBackend, kv_cache: list[Tensor], num_blocks: int) -> None:
        self._backend = backend
        self._kv_cache = kv_cache
        self._bytes_per_block = backend.spec.bytes_per_block * len(kv_cache)
        self._portion = -(-max(PORTION, LARGE_PAGE * len(kv_cache)) // self._bytes_per_block)
        self._num_blocks = num_blocks
        self._num_ready = 0
        self._seconds = {True: 0.0, False: 0.0}  # for a GiB in large pages and in small ones, the last time
        self.reach(0)

    def reach(self, block_id: int) -> None:
        """Let the memory of blocks up to this one be there: unused blocks are taken in their order."""
        assert block_id < self._num_blocks, f"block {block_id} is not one of {self._num_blocks}"
        while self._num_ready <= block_id:
            self._get_portion()

    def _get_portion(self) -> None:
        end = min(self._num_ready + self._portion, self._num_blocks)
        are_slow = self._seconds[True] > SLOW_PAGES
        in_large_pages = not are_slow or self._seconds[False] * WORTH_SMALL_PAGES > self._seconds[True]
        began = time.perf_counter()
        self._backend.get_memory(self._kv_cache, self._num_ready, end, in_large_pages)
        size = self._bytes_per_block * (end - self._num_ready)
        self._seconds[in_large_pages] = (time.perf_counter() - began) * GIB / size
        self._num_ready = end
