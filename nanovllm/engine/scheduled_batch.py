"""ScheduledBatch: one step, as the scheduler tells it to the model runners, and on its way to other ranks.

What is made anew in each step is a named tuple, here and in the model runner: a frozen dataclass takes four times as long.
"""

from array import array
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.sampling_params import SamplingParams

IntArray = NDArray[np.int64]


class StartedSequence(NamedTuple):
    """A sequence that joins the running ones: all that a model runner needs to know of it."""

    row: int  # what was in this row before has ended
    seq_id: int
    token_ids: "array[int]"  # prompt and, after a preemption, output so far
    num_prompt_tokens: int
    num_computed_tokens: int  # found in the prefix cache
    block_table: tuple[int, ...]
    sampling_params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...] = ()  # what min_tokens forbids at first


class ScheduledBatch(NamedTuple):
    """One step, as increments to what the model runners know already. To be applied in this order."""

    started: tuple[StartedSequence, ...]
    new_blocks: tuple[tuple[int, int], ...]  # (row of a sequence that goes on, block appended to its table)
    rows: IntArray  # [num_seqs]: the batch, in order of arrival
    num_tokens: IntArray  # [num_seqs]: tokens to compute of each, at least 1
    num_prefill_tokens: int  # of these, tokens of prompts and of sequences that start again
    num_decode_tokens: int  # and the others, one for each sequence that decodes

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one token to compute, its last, from which the next is sampled."""
        return self.num_prefill_tokens == 0


PackedStep = tuple[bytes, bytes, bytes, tuple[StartedSequence, ...], tuple[tuple[int, int], ...], int, int]


def pack_step(sampled: IntArray, batch: ScheduledBatch) -> PackedStep:
    """What a worker is sent for a step, as what pickle is quick with: an array or a dataclass takes ten times as long.

    Args:
        sampled: the tokens that rank 0 sampled in the step before; empty if that failed.
        batch: the step.
    """
    arrays = (sampled, batch.rows, batch.num_tokens)
    assert all(array.dtype == np.int64 for array in arrays), "the arrays of a step are int64"
    sampled_bytes, rows, num_tokens = (array.tobytes() for array in arrays)
    rest = (batch.started, batch.new_blocks, batch.num_prefill_tokens, batch.num_decode_tokens)
    return (sampled_bytes, rows, num_tokens, *rest)


def unpack_step(packed: PackedStep) -> tuple[IntArray, ScheduledBatch]:
    """What `pack_step` was given."""
    sampled, rows, num_tokens, started, new_blocks, num_prefill_tokens, num_decode_tokens = packed
    batch = ScheduledBatch(
        started=started,
        new_blocks=new_blocks,
        rows=np.frombuffer(rows, np.int64),
        num_tokens=np.frombuffer(num_tokens, np.int64),
        num_prefill_tokens=num_prefill_tokens,
        num_decode_tokens=num_decode_tokens,
    )
    return np.frombuffer(sampled, np.int64), batch
