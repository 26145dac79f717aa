"""CUDA graphs of steps: what the GPU is to do is recorded once and replayed, without Python between the kernels.

A graph has fixed shapes and addresses. So steps are padded to one of a few shapes, all with block tables of the widest kind,
and their inputs come through one buffer at fixed places (`InputBuffer`). Decode batches have shapes by the number of
sequences. All others, in which prompts are computed beside decodes, have shapes by the number of tokens: launched from
Python, their kernels would take several times as long as they run.
"""

import bisect
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nanovllm.engine.step_inputs import StepShape

logger = logging.getLogger(__name__)

LARGEST_DECODE = 512  # sequences; larger batches take the shapes by tokens
SMALLEST_CHUNKS = 64  # tokens
MAX_CAPTURE_SECONDS = 120.0

Run = Callable[[], Tensor]  # computes hidden states from tensors at fixed addresses
Capture = Callable[[Run], Run]  # records a run: the returned one does the same again, into the same tensor


def decode_sizes(max_num_seqs: int) -> list[int]:
    """The numbers of sequences to capture decodes of, ascending: 1, 2, 4, 8, every 16th, and the largest batch itself."""
    largest = min(max_num_seqs, LARGEST_DECODE)
    sizes = {1, 2, 4, 8, *range(16, largest + 1, 16), largest}
    return sorted(size for size in sizes if size <= largest)


def chunk_sizes(max_num_tokens: int) -> list[int]:
    """The numbers of tokens to capture other steps of, ascending: four to each doubling, and the largest step itself."""

    def sizes() -> Iterator[int]:
        size = SMALLEST_CHUNKS
        while size < max_num_tokens:
            yield size
            size += max(SMALLEST_CHUNKS, 1 << size.bit_length() >> 3)
        yield max_num_tokens

    return list(sizes())


class CudaCapture:
    """Captures into CUDA graphs that share one memory pool.

    Args:
        result: [rows of the largest run, ...], where all runs leave theirs: nothing of a graph has to be kept for itself.
    """

    def __init__(self, result: Tensor) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._result = result

    def __call__(self, run: Run) -> Run:
        """See `Capture`."""
        run()  # compiles and chooses kernels, which cannot be captured
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what that took: the graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()
            result = self._result[: len(output)].copy_(output)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class CapturedStep(NamedTuple):
    """A graph of a step."""

    shape: StepShape  # of its inputs
    replay: Run  # computes what they hold now; the next replay of any graph overwrites the result


class StepGraphs:
    """The captured steps.

    Args:
        shapes: to capture, in this order: those that would be missed most come first.
        make_run: for a shape, what is to be captured.
        capture: how.
        max_seconds: when to stop capturing. Steps for which there is no graph run eagerly.
    """

    def __init__(
        self,
        shapes: Iterable[StepShape],
        make_run: Callable[[StepShape], Run],
        capture: Capture,
        max_seconds: float = MAX_CAPTURE_SECONDS,
    ) -> None:
        wanted, captured = list(shapes), list[CapturedStep]()
        deadline = time.monotonic() + max_seconds
        for shape in tqdm(wanted, desc="Capturing CUDA graphs", dynamic_ncols=True):
            if captured and time.monotonic() > deadline:
                logger.warning("captured %d of %d CUDA graphs in %.0f s", len(captured), len(wanted), max_seconds)
                break
            captured.append(CapturedStep(shape, capture(make_run(shape))))
        captured.sort(key=_num_tokens)
        self._decodes = [step for step in captured if step.shape.is_decode]
        self._chunks = [step for step in captured if not step.shape.is_decode]

    def find(self, num_tokens: int, is_decode: bool) -> CapturedStep | None:
        """The smallest captured step that holds a batch, or None where it has to run eagerly."""
        for steps in (self._decodes, self._chunks) if is_decode else (self._chunks,):
            index = bisect.bisect_left(steps, num_tokens, key=_num_tokens)
            if index < len(steps):
                return steps[index]
        return None


def _num_tokens(step: CapturedStep) -> int:
    return step.shape.num_tokens
