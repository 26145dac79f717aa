"""The inputs of one step, as arrays: what `InputBatch` makes of a scheduled batch."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.sampling_state import SamplingOptions

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


class PromptTargets(NamedTuple):
    """Prompt tokens of one sequence whose log-probabilities this step can tell, by the hidden state before each."""

    seq_id: int
    num_logprobs: int
    first_position: int  # of the first target in its prompt
    first_index: int  # where the token before it is among num_tokens; the others follow
    token_ids: Int64Array  # [num_targets]


class StepShape(NamedTuple):
    """What decides where the inputs of a step lie in their buffer, and which kernels compute it."""

    num_tokens: int
    num_seqs: int
    max_blocks: int  # columns of the block tables
    max_seqlen_q: int
    max_context_len: int

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computes one token."""
        return self.max_seqlen_q == 1


class StepInputs(NamedTuple):
    """The inputs of one step, as arrays. See `AttentionMetadata` for those that go there."""

    input_ids: Int64Array  # [num_tokens]
    positions: Int64Array  # [num_tokens]
    slot_mapping: Int64Array  # [num_tokens]
    cu_seqlens_q: Int32Array  # [num_seqs + 1]
    context_lens: Int32Array  # [num_seqs]
    block_tables: Int32Array  # [num_seqs, max_blocks]
    max_seqlen_q: int
    max_context_len: int
    sampled_rows: Int64Array  # [num_sampled]: rows of the sequences whose last token is in this step, in batch order
    logits_indices: Int64Array  # [num_sampled]: where that token is among num_tokens
    prompt_targets: tuple[PromptTargets, ...]  # empty: nobody asks for prompt_logprobs

    @property
    def shape(self) -> StepShape:
        """Of the step as it is."""
        num_seqs, max_blocks = self.block_tables.shape
        return StepShape(len(self.input_ids), num_seqs, max_blocks, self.max_seqlen_q, self.max_context_len)


def placeholder_inputs(seqlens_q: list[int], context_len: int, max_blocks: int) -> StepInputs:
    """A step in the shape of a real one that writes nothing: for warm-up and capture.

    Args:
        seqlens_q: tokens of each sequence; the last token of each is sampled.
        context_len: of every sequence; all its blocks are block 0.
        max_blocks: columns of the block tables.
    """
    num_seqs, num_tokens = len(seqlens_q), sum(seqlens_q)
    cu_seqlens_q = np.cumsum([0, *seqlens_q], dtype=np.int32)
    return StepInputs(
        input_ids=np.zeros(num_tokens, np.int64),
        positions=np.zeros(num_tokens, np.int64),
        slot_mapping=np.full(num_tokens, -1),
        cu_seqlens_q=cu_seqlens_q,
        context_lens=np.full(num_seqs, context_len, np.int32),
        block_tables=np.zeros((num_seqs, max_blocks), np.int32),
        max_seqlen_q=max(seqlens_q, default=1),
        max_context_len=context_len,
        sampled_rows=np.zeros(num_seqs, np.int64),
        logits_indices=cu_seqlens_q[1:].astype(np.int64) - 1,
        prompt_targets=(),
    )


class SamplingInputs(NamedTuple):
    """How one token of each row is picked."""

    temperatures: NDArray[np.float32]  # [num_rows]
    uniforms: NDArray[np.float32]  # [num_rows]
    options: SamplingOptions | None  # None: no row uses any
