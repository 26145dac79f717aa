"""CUDA graphs of decode steps: what the GPU is to do is recorded once and replayed, without Python between the kernels.

A graph has fixed shapes and addresses. So decode batches are padded to one of a few sizes, all with block tables of the
widest kind, and their inputs come through one buffer at fixed places (`InputBuffer`). Prefill and larger batches run
eagerly: there the GPU is busy long enough for Python to keep ahead of it.
"""

import bisect
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

LARGEST_SIZE = 512  # graphs for larger batches would gain little
MAX_CAPTURE_SECONDS = 120.0

Run = Callable[[], Tensor]  # computes hidden states from tensors at fixed addresses
Capture = Callable[[Run], Run]  # records a run: the returned one does the same again, into the same tensor


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes to capture, ascending: 1, 2, 4, 8, every 16th, and the largest batch itself."""
    largest = min(max_num_seqs, LARGEST_SIZE)
    sizes = {1, 2, 4, 8, *range(16, largest + 1, 16), largest}
    return sorted(size for size in sizes if size <= largest)


class CudaCapture:
    """Captures into CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """See `Capture`."""
        run()  # compiles and chooses kernels, which cannot be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class DecodeGraphs:
    """The captured decode steps, by batch size.

    Args:
        sizes: batch sizes, ascending.
        make_run: for a size, what is to be captured.
        capture: how.
        max_seconds: when to stop capturing. The largest size comes first, so that any batch still finds a graph.
    """

    def __init__(
        self, sizes: list[int], make_run: Callable[[int], Run], capture: Capture, max_seconds: float = MAX_CAPTURE_SECONDS
    ) -> None:
        self._graphs: dict[int, Run] = {}
        deadline = time.monotonic() + max_seconds
        for size in tqdm(sizes[::-1], desc="Capturing CUDA graphs", dynamic_ncols=True):
            if self._graphs and time.monotonic() > deadline:
                logger.warning("captured %d of %d CUDA graphs in %.0f s", len(self._graphs), len(sizes), max_seconds)
                break
            self._graphs[size] = capture(make_run(size))
        self._sizes = sorted(self._graphs)

    def size_for(self, num_seqs: int) -> int | None:
        """The smallest captured size that holds a batch, or None where it has to run eagerly."""
        index = bisect.bisect_left(self._sizes, num_seqs)
        return self._sizes[index] if index < len(self._sizes) else None

    def replay(self, size: int) -> Tensor:
        """Run the graph of a size on what its inputs hold now; its output is overwritten by the next replay."""
        return self._graphs[size]()
