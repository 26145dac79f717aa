"""InputBuffer: a step's inputs on their way to the device, packed side by side and copied at once.

Many small copies cost more than what they carry. All arrays of a step are written into one buffer on the host, one copy
takes it to the device, and the tensors are views of the buffer there. Equal shapes give equal addresses, which is what a
captured CUDA graph needs of its inputs. On a CPU both buffers are the same memory, and nothing is copied.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.engine.input_batch import StepInputs
from nanovllm.utils.context import AttentionMetadata

ALIGNMENT = 16  # bytes


@dataclass(frozen=True, slots=True)
class StepTensors:
    """The inputs of one step on the device."""

    input_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    metadata: AttentionMetadata
    logits_indices: Tensor  # int64 [num_sampled]
    temperatures: Tensor  # float32 [num_sampled]
    uniforms: Tensor  # float32 [num_sampled]


class InputBuffer:
    """The two buffers.

    Args:
        host: uint8 [num_bytes]; pinned where the device is a GPU, so that the copy can be asynchronous. The caller must not
            upload again before the copy has been made.
        device: uint8 [num_bytes]; on a CPU `host` itself.
    """

    def __init__(self, host: Tensor, device: Tensor) -> None:
        self._host, self._device = host, device
        self._bytes: NDArray[np.uint8] = host.numpy()
        self._end = 0

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
        num_padding = num_rows - len(inputs.context_lens)
        num_tokens = len(inputs.input_ids) + num_padding
        starts = np.arange(num_rows + 1, dtype=np.int32) if num_padding else inputs.cu_seqlens_q
        self._end = 0
        offsets = (
            self._pack(inputs.input_ids, num_tokens),
            self._pack(inputs.positions, num_tokens),
            self._pack(inputs.slot_mapping, num_tokens, fill=-1),
            self._pack(starts, num_rows + 1),
            self._pack(inputs.context_lens, num_rows),
            self._pack_tables(inputs.block_tables, num_rows, max_blocks),
            # What differs in number from what runs comes last: it moves nothing else.
            self._pack(inputs.logits_indices, len(inputs.logits_indices)),
            self._pack(inputs.temperatures, len(inputs.temperatures)),
            self._pack(inputs.uniforms, len(inputs.uniforms)),
        )
        if self._device is not self._host:
            self._device[: self._end].copy_(self._host[: self._end], non_blocking=True)
        views = [self._device[begin:end].view(dtype) for begin, end, dtype in offsets]
        input_ids, positions, slots, cu_seqlens_q, context_lens, tables, logits_indices, temperatures, uniforms = views
        metadata = AttentionMetadata(
            cu_seqlens_q=cu_seqlens_q,
            context_lens=context_lens,
            block_tables=tables.view(num_rows, max_blocks),
            slot_mapping=slots,
            max_seqlen_q=inputs.max_seqlen_q,
            max_context_len=max_context_len,
        )
        return StepTensors(input_ids, positions, metadata, logits_indices, temperatures, uniforms)

    def _pack(self, array: NDArray[np.generic], length: int, fill: int = 0) -> tuple[int, int, torch.dtype]:
        """Write `array`, filled up to `length`; its place in bytes, and its dtype."""
        begin, end = self._reserve(length * array.itemsize)
        view = self._bytes[begin:end].view(array.dtype)
        view[: len(array)] = array
        view[len(array) :] = fill
        return begin, end, _TORCH_DTYPES[array.dtype.char]

    def _pack_tables(self, tables: NDArray[np.int32], num_rows: int, max_blocks: int) -> tuple[int, int, torch.dtype]:
        """Write the block tables in the corner of a larger array; the rest stays as it was, since nobody reads it."""
        begin, end = self._reserve(num_rows * max_blocks * tables.itemsize)
        view = self._bytes[begin:end].view(np.int32).reshape(num_rows, max_blocks)
        view[: tables.shape[0], : tables.shape[1]] = tables
        return begin, end, torch.int32

    def _reserve(self, num_bytes: int) -> tuple[int, int]:
        begin = self._end
        assert begin + num_bytes <= len(self._bytes), f"a step's inputs exceed their buffer of {len(self._bytes)} bytes"
        self._end = begin + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return begin, begin + num_bytes


_TORCH_DTYPES = {"l": torch.int64, "q": torch.int64, "i": torch.int32, "f": torch.float32}
