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

from nanovllm.engine.step_inputs import StepInputs
from nanovllm.utils.context import AttentionMetadata

ALIGNMENT = 16  # bytes
MAX_LAYOUTS = 128  # that are remembered: more than there are graphs

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
        self._layouts: dict[tuple[int, int, int, int], _Layout] = {}

    @staticmethod
    def num_bytes(max_num_tokens: int, max_num_seqs: int, max_blocks: int) -> int:
        """What the largest step needs: 3 arrays of tokens, the block tables, and a dozen values a sequence."""
        return 24 * max(max_num_tokens, max_num_seqs) + (4 * max_blocks + 128) * max_num_seqs + 64 * ALIGNMENT

    def upload(self, inputs: StepInputs) -> StepTensors:
        """Take a step to the device as it is."""
        return self._upload(inputs, len(inputs.context_lens), inputs.block_tables.shape[1], inputs.max_context_len)

    def upload_decode(self, inputs: StepInputs, num_rows: int, max_blocks: int, max_context_len: int) -> StepTensors:
        """Take a step in which all sequences decode to the device, in the shapes of a batch of `num_rows`.

        The added rows write nothing (slot -1) and see nothing (context 0), whatever their block tables hold.
        """
        return self._upload(inputs, num_rows, max_blocks, max_context_len)

    def _upload(self, inputs: StepInputs, num_rows: int, max_blocks: int, max_context_len: int) -> StepTensors:
        num_seqs, width = inputs.block_tables.shape
        num_tokens = len(inputs.input_ids) + num_rows - num_seqs
        shape = (num_tokens, num_rows, max_blocks, len(inputs.logits_indices))
        layout = self._layouts.get(shape)
        if layout is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[shape] = _Layout.of(shape, self._host, self._device)
        host, device = layout.host, layout.device
        size = len(inputs.input_ids)
        host.input_ids[:size] = inputs.input_ids
        host.positions[:size] = inputs.positions
        host.slot_mapping[:size] = inputs.slot_mapping
        host.context_lens[:num_seqs] = inputs.context_lens
        host.cu_seqlens_q[: num_seqs + 1] = inputs.cu_seqlens_q
        host.block_tables[:num_seqs, :width] = inputs.block_tables  # nobody reads the others
        host.logits_indices[:] = inputs.logits_indices
        if num_rows > num_seqs:
            host.input_ids[size:] = host.positions[size:] = host.context_lens[num_seqs:] = 0
            host.slot_mapping[size:] = -1
            host.cu_seqlens_q[num_seqs + 1 :] = range(num_seqs + 1, num_rows + 1)  # queries of one token
        if self._device is not self._host:
            self._device[: layout.num_bytes].copy_(self._host[: layout.num_bytes], non_blocking=True)
        metadata = AttentionMetadata(
            cu_seqlens_q=device.cu_seqlens_q,
            context_lens=device.context_lens,
            block_tables=device.block_tables,
            slot_mapping=device.slot_mapping,
            max_seqlen_q=inputs.max_seqlen_q,
            max_context_len=max_context_len,
        )
        return StepTensors(device.input_ids, device.positions, metadata, device.logits_indices)


@dataclass(frozen=True, slots=True)
class _Views(Generic[Array]):
    """The arrays of a step in one of the buffers. See `StepInputs` for what they hold."""

    positions: Array  # first, at offset 0: compiled code is made anew when an offset of its inputs changes
    input_ids: Array
    slot_mapping: Array
    context_lens: Array
    cu_seqlens_q: Array
    block_tables: Array
    logits_indices: Array  # last: in a padded batch they are fewer than what runs, and must move nothing else


class _Layout(NamedTuple):
    """Where the arrays of steps of one shape are. Made once a shape: views of tensors are slow to make."""

    host: _Views[NDArray[np.generic]]
    device: _Views[Tensor]
    num_bytes: int

    @staticmethod
    def of(shape: tuple[int, int, int, int], host: Tensor, device: Tensor) -> "_Layout":
        """The layout of steps with so many tokens, sequences, columns of the block tables, and sampled tokens."""
        num_tokens, num_seqs, max_blocks, num_sampled = shape
        int64, int32 = torch.int64, torch.int32
        host_views, device_views, end = [], [], 0
        for dtype, size in (
            (int64, (num_tokens,)),
            (int64, (num_tokens,)),
            (int64, (num_tokens,)),
            (int32, (num_seqs,)),
            (int32, (num_seqs + 1,)),
            (int32, (num_seqs, max_blocks)),
            (int64, (num_sampled,)),
        ):
            begin, num_bytes = end, math.prod(size) * dtype.itemsize
            end = begin + -(-num_bytes // ALIGNMENT) * ALIGNMENT
            assert end <= len(host), f"the inputs of a step of shape {shape} exceed their buffer of {len(host)} bytes"
            host_views.append(host[begin : begin + num_bytes].view(dtype).view(size).numpy())
            device_views.append(device[begin : begin + num_bytes].view(dtype).view(size))
        return _Layout(_Views(*host_views), _Views(*device_views), end)
