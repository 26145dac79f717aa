"""The memory that CPU kernels keep for results: used again, by one tensor at a time, and never more than was needed."""

import ctypes
import mmap
import multiprocessing
import sys
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


@pytest.mark.parametrize("in_large_pages", [True, False])
def test_getting_memory_changes_nothing_that_is_in_it(in_large_pages: bool) -> None:
    backend = CPUBackend(AttentionSpec(2, 2, 32, 32, torch.float32, torch.device("cpu")))
    cache = backend.allocate_cache(300).fill_(3.0)
    backend.get_memory([cache], 100, 300, in_large_pages)
    assert (cache == 3.0).all()


def resident_pages(tensor: Tensor) -> int:
    """How many pages of its memory the process has."""
    pages = (ctypes.c_ubyte * (tensor.nbytes // mmap.PAGESIZE))()
    failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), pages)
    assert not failed
    return sum(page & 1 for page in pages)


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are Linux's")
def test_what_would_be_a_large_page_is_got_as_a_whole() -> None:
    row, num_rows = 24 * 1024, 4096  # 85 rows and a third in 2 MiB
    memory = mmap.mmap(-1, row * num_rows, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # that nobody has used before
    rows, first = torch.frombuffer(memory, dtype=torch.uint8).view(num_rows, row), 0
    for end, num_large in ((85, 1), (86, 2), (170, 2), (171, 3), (1024, 12), (4096, 48)):
        load_kernels().populate([rows], first, end, False)
        assert resident_pages(rows) == num_large * 2 * MIB // mmap.PAGESIZE
        first = end


class Clocked(CPUBackend):
    """A backend whose time it takes to get memory is given, in seconds for a GiB, and which keeps what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(AttentionSpec(64, 64, 256, 32, torch.float32, torch.device("cpu")))  # blocks of 4 MiB
        self.large, self.small = 0.1, 0.2
        self.in_large_pages: list[bool] = []
        self.now = 0.0
        monkeypatch.setattr("nanovllm.engine.kv_cache.time.perf_counter", lambda: self.now)

    def get_memory(self, kv_cache: list[Tensor], first_block: int, end_block: int, in_large_pages: bool) -> None:
        self.in_large_pages.append(in_large_pages)
        size = (end_block - first_block) * self.spec.bytes_per_block * len(kv_cache)
        self.now += (self.large if in_large_pages else self.small) * size / 2**30


def test_pages_are_large_unless_small_ones_are_much_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Clocked(monkeypatch)
    memory = BlockMemory(backend, [torch.empty(0)], 1000)
    portion = PORTION // backend.spec.bytes_per_block
    last = 0

    def get(num_portions: int) -> list[bool]:
        nonlocal last
        backend.in_large_pages.clear()
        last += num_portions * portion
        memory.reach(last)
        return backend.in_large_pages

    assert get(4) == [True] * 4, "as fast as they are: small ones are not even tried"
    backend.large, backend.small = 2.0, 0.8
    assert get(4) == [True, False, True, True], "slow now, but small ones hardly less"
    backend.large = 2.5
    assert get(4) == [True, False, False, False]
    backend.small = 3.0
    assert get(4) == [False, True, True, True], "there are no more of them at hand"
    backend.large = 0.3
    assert get(4) == [True] * 4
