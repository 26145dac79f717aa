"""InputBuffer: a step's inputs on their way to the device, packed side by side and copied at once.

Many small copies cost more than what they carry. All arrays of a step are written into one buffer on the host, one copy
takes it to the device, and the tensors are views of the buffer there. Equal shapes give equal addresses, which is what a
captured CUDA graph needs of its inputs. On a CPU both buffers are the same memory, and nothing is copied.
"""

import math
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.engine.step_inputs import StepInputs, StepShape
from nanovllm.utils.context import AttentionMetadata

ALIGNMENT = 16  # bytes
MAX_LAYOUTS = 256  # that are remembered: more than there are graphs

Array = TypeVar("Array")


class StepTensors(NamedTuple):
    """The inputs of one step on the device."""

    input_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    metadata: AttentionMetadata
    logits_indices: Tensor  # int64 [num_sampled]


class InputBuffer:
    """The two buffers.

    Args:
        host: uint8 [num_bytes]; pinned where the device is a GPU, so that the copy can be asynchronous. The caller must not
            upload again before the copy has been made.
        device: uint8 [num_bytes]; on a CPU `host` itself.
    """

    def __init__(self, host: Tensor, device: Tensor) -> None:
        self._host, self._device = host, device
        self._layouts: dict[tuple[int, int, int], _Layout] = {}

    @staticmethod
    def num_bytes(max_num_tokens: int, max_num_seqs: int, max_blocks: int) -> int:
        """What the largest step needs: 3 arrays of tokens, the block tables, and a few values a sequence, and one more."""
        return 24 * max(max_num_tokens, max_num_seqs) + (4 * max_blocks + 32) * (max_num_seqs + 1) + 64 * ALIGNMENT

    def upload(self, inputs: StepInputs, shape: StepShape | None = None) -> StepTensors:
        """Take a step to the device.

        Args:
            inputs: of the step.
            shape: to pad it to; by default as it is. It has room for one sequence more, unless nothing is added: what is
                added belongs to sequences that write nothing (slot -1) and see nothing (context 0), whatever their block
                tables hold. In a decode each has one token, else the first has them all.
        """
        shape = shape or inputs.shape
        layout = self._layout_of(shape)
        host, device = layout.host, layout.device
        (num_seqs, width), size, num_sampled = inputs.block_tables.shape, len(inputs.input_ids), len(inputs.logits_indices)
        host.input_ids[:size] = inputs.input_ids
        host.positions[:size] = inputs.positions
        host.slot_mapping[:size] = inputs.slot_mapping
        host.context_lens[:num_seqs] = inputs.context_lens
        host.cu_seqlens_q[: num_seqs + 1] = inputs.cu_seqlens_q
        host.block_tables[:num_seqs, :width] = inputs.block_tables  # nobody reads the others
        host.logits_indices[:num_sampled] = inputs.logits_indices
        if shape.num_seqs > num_seqs:
            host.input_ids[size:] = host.positions[size:] = host.context_lens[num_seqs:] = 0
            host.slot_mapping[size:] = -1
            added = shape.num_seqs - num_seqs
            ends = np.arange(size + 1, size + added + 1) if shape.is_decode else shape.num_tokens
            host.cu_seqlens_q[num_seqs + 1 :] = ends
        if self._device is not self._host:
            self._device[: layout.num_bytes].copy_(self._host[: layout.num_bytes], non_blocking=True)
        metadata = AttentionMetadata(
            cu_seqlens_q=device.cu_seqlens_q,
            context_lens=device.context_lens,
            block_tables=device.block_tables,
            slot_mapping=device.slot_mapping,
            max_seqlen_q=shape.max_seqlen_q,
            max_context_len=shape.max_context_len,
        )
        sampled = device.logits_indices if num_sampled == shape.num_seqs else device.logits_indices[:num_sampled]
        return StepTensors(device.input_ids, device.positions, metadata, sampled)

    def _layout_of(self, shape: StepShape) -> "_Layout":
        sizes = shape.num_tokens, shape.num_seqs, shape.max_blocks
        if sizes not in self._layouts:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            self._layouts[sizes] = _Layout.of(sizes, self._host, self._device)
        return self._layouts[sizes]


@dataclass(frozen=True, slots=True)
class _Views(Generic[Array]):
    """The arrays of a step in one of the buffers. See `StepInputs` for what they hold."""

    input_ids: Array
    positions: Array
    slot_mapping: Array
    context_lens: Array
    cu_seqlens_q: Array
    block_tables: Array
    logits_indices: Array  # [num_seqs], of which those that are sampled come first


class _Layout(NamedTuple):
    """Where the arrays of steps of one shape are. Made once a shape: views of tensors are slow to make."""

    host: _Views[NDArray[np.generic]]
    device: _Views[Tensor]
    num_bytes: int

    @staticmethod
    def of(sizes: tuple[int, int, int], host: Tensor, device: Tensor) -> "_Layout":
        """The layout of steps with so many tokens, sequences, and columns of the block tables."""
        num_tokens, num_seqs, max_blocks = sizes
        int64, int32 = torch.int64, torch.int32
        host_views, device_views, end = [], [], 0
        for dtype, size in (
            (int64, (num_tokens,)),
            (int64, (num_tokens,)),
            (int64, (num_tokens,)),
            (int32, (num_seqs,)),
            (int32, (num_seqs + 1,)),
            (int32, (num_seqs, max_blocks)),
            (int64, (num_seqs,)),
        ):
            begin, num_bytes = end, math.prod(size) * dtype.itemsize
            end = begin + -(-num_bytes // ALIGNMENT) * ALIGNMENT
            assert end <= len(host), f"the inputs of a step of sizes {sizes} exceed their buffer of {len(host)} bytes"
            host_views.append(host[begin : begin + num_bytes].view(dtype).view(size).numpy())
            device_views.append(device[begin : begin + num_bytes].view(dtype).view(size))
        return _Layout(_Views(*host_views), _Views(*device_views), end)
