"""The memory that CPU kernels keep for results: used again, by one tensor at a time, and never more than was needed."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import psutil
import pytest
import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionSpec
from nanovllm.attention.cpu import CPUBackend
from nanovllm.engine.kv_cache import PORTION, BlockMemory
from nanovllm.utils.cpu_build import load_kernels

MIB = 2**20


def compute(value: float, size: int, cols: int = 256) -> Tensor:
    """A new tensor of `size` bytes, from a kernel: a norm of equal values is 1, times the weight."""
    one_row = torch.ones(1, cols)
    return load_kernels().rms_norm(one_row.expand(size // (4 * cols), cols), torch.full((cols,), value), 0.0)


def test_memory_is_used_again_and_by_one_tensor_at_a_time() -> None:
    first, second = compute(1.0, 4 * MIB), compute(2.0, 4 * MIB)
    place = first.data_ptr()
    assert second.data_ptr() != place
    view = first[5:]
    del first
    third = compute(3.0, 4 * MIB)
    assert third.data_ptr() != place, "of which a view is left"
    del view
    others = [compute(4.0, 4 * MIB) for _ in range(20)]  # before it, what other tests have left
    assert place in [tensor.data_ptr() for tensor in others]
    for tensor, value in ((second, 2.0), (third, 3.0), *((other, 4.0) for other in others)):
        assert (tensor == value).all()


def memory_of_growing_results() -> int:
    """By how much this process has grown when 32 results, each larger than all before it, have come and gone."""
    process = psutil.Process()
    compute(1.0, 8 * MIB)
    before: int = process.memory_info().rss
    for size in range(8 * MIB, 40 * MIB, MIB):
        compute(1.0, size)
    return process.memory_info().rss - before


def test_no_more_is_kept_than_was_in_use_at_once() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        assert fresh.submit(memory_of_growing_results).result() < 2 * 40 * MIB


def test_small_and_empty_results() -> None:
    for size in (0, 1024, 100 * 1024):
        assert (compute(2.0, size) == 2.0).all()


def test_from_several_threads() -> None:
    def work(value: float) -> bool:
        return all(bool((compute(value, size * MIB // 4) == value).all()) for size in (1, 3, 2, 5, 1) * 10)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, map(float, range(1, 9))))


def test_memory_is_got_as_far_as_blocks_are_used() -> None:
    spec = AttentionSpec(64, 64, 256, 32, torch.float32, torch.device("cpu"))  # blocks of 4 MiB
    backend = CPUBackend(spec)
    before = psutil.Process().memory_info().rss
    cache = [backend.allocate_cache(500) for _ in range(2)]
    memory = BlockMemory(backend, cache, 500)

    def grown() -> int:
        return (psutil.Process().memory_info().rss - before) >> 20

    portion, num_blocks = PORTION >> 20, PORTION >> 23  # of 4 MiB in each of two layers
    assert portion * 0.9 <= grown() <= portion * 1.5, "the first portion, of 4,000 MiB"
    for block_id in range(num_blocks):
        memory.reach(block_id)
    assert grown() <= portion * 1.5
    memory.reach(num_blocks)
    assert portion * 1.9 <= grown() <= portion * 2.5
    memory.reach(0)
    assert grown() <= portion * 2.5
    with pytest.raises(AssertionError, match="block 500 is not one of 500"):
        memory.reach(500)


def test_getting_memory_changes_nothing_that_is_in_it() -> None:
    backend = CPUBackend(AttentionSpec(2, 2, 32, 32, torch.float32, torch.device("cpu")))
    cache = backend.allocate_cache(300).fill_(3.0)
    backend.get_memory([cache], 100, 300)
    assert (cache == 3.0).all()
