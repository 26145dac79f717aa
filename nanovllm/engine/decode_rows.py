"""DecodeRows: sequences that decode together step after step, side by side in the order of the batch.

What `InputBatch` keeps by row would have to be gathered and scattered in each step. Here all of them go on by one token.
"""

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.sampling_state import SamplingState
from nanovllm.engine.step_inputs import Int64Array, StepInputs

_DRAWN_AHEAD = 8  # tokens; drawing for several costs little more than for one


class DecodeRows:
    """Some rows of an `InputBatch`, in a step in which each sequence computes its last token.

    The arrays that a step was given are not changed in later ones: they may still be on their way to a device.

    Args:
        rows: int64 [num_seqs], which are they.
        input_ids: int64 [num_seqs], the last tokens.
        positions: int64 [num_seqs], where these are.
        block_tables: int32 [max_num_seqs, max_blocks], of all rows.
        slot_offsets: int64 [max_num_seqs], of all rows: from a position in the last block to its slot.
    """

    block_tables: NDArray[np.int32]  # [num_seqs, max_blocks]
    _slot_mapping: Int64Array

    def __init__(
        self,
        rows: Int64Array,
        input_ids: Int64Array,
        positions: Int64Array,
        block_tables: NDArray[np.int32],
        slot_offsets: Int64Array,
    ) -> None:
        self.rows, self.input_ids, self.positions = rows, input_ids, positions
        self.num_tokens = positions + 1  # of each sequence, so far
        self.take_blocks(block_tables, slot_offsets)
        self._max_num_tokens = int(self.num_tokens.max())
        self._indices = np.arange(len(rows))
        self._cu_seqlens_q = np.arange(len(rows) + 1, dtype=np.int32)  # queries of one token
        self._uniforms = np.zeros((0, len(rows)), np.float32)  # of the next tokens

    def are(self, rows: Int64Array) -> bool:
        """Whether these are the ones."""
        return rows is self.rows or np.array_equal(rows, self.rows)

    def append(self, token_ids: Int64Array) -> None:
        """Add a token to each."""
        self.input_ids = token_ids

    def advance(self) -> None:
        """Go on to the step that computes the tokens that were added last."""
        self.positions = self.num_tokens
        self.num_tokens = self.num_tokens + 1
        self._slot_mapping = self._slot_mapping + 1
        self._max_num_tokens += 1
        self._uniforms = self._uniforms[1:]

    def take_blocks(self, block_tables: NDArray[np.int32], slot_offsets: Int64Array) -> None:
        """Take the block tables over from those of all rows, whenever some are longer than before."""
        self.block_tables = block_tables.take(self.rows, axis=0)
        self._slot_mapping = self.positions + slot_offsets[self.rows]

    def draw(self, sampling: SamplingState) -> NDArray[np.float32]:
        """The numbers that pick the next tokens, [num_seqs]."""
        if len(self._uniforms) == 0:
            self._uniforms = sampling.draw(self.rows, self.num_tokens + np.arange(_DRAWN_AHEAD)[:, np.newaxis])
        return self._uniforms[0]

    def inputs(self, block_size: int) -> StepInputs:
        """The inputs of the step."""
        return StepInputs(
            input_ids=self.input_ids,
            positions=self.positions,
            slot_mapping=self._slot_mapping,
            cu_seqlens_q=self._cu_seqlens_q,
            context_lens=self.num_tokens.astype(np.int32),
            block_tables=self.block_tables[:, : -(-self._max_num_tokens // block_size)],
            max_seqlen_q=1,
            max_context_len=self._max_num_tokens,
            sampled_rows=self.rows,
            logits_indices=self._indices,
            prompt_targets=(),
        )
