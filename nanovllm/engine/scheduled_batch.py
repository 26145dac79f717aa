"""ScheduledBatch: one step, as the scheduler tells it to the model runners.

What is made anew in each step is a named tuple, here and in the model runner: a frozen dataclass takes four times as long.
"""

from array import array
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.sampling_params import SamplingParams

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StartedSequence:
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
