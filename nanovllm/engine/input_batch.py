"""InputBatch: what one rank knows of the running sequences, and the inputs of a step made of it.

Each running sequence has a row, chosen by the scheduler, in arrays that are allocated once. A scheduled batch changes them
by increments; the inputs of a step are then a few array operations, whatever mixture of prefill chunks and decodes it is.
Nothing needs to be undone when a sequence ends: its row is overwritten by the next that is given it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.sampling_state import NO_LOGPROBS, SamplingOptions, SamplingState
from nanovllm.engine.scheduler import ScheduledBatch, StartedSequence

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


class PromptTargets(NamedTuple):
    """Prompt tokens of one sequence whose log-probabilities this step can tell, by the hidden state before each."""

    seq_id: int
    num_logprobs: int
    first_position: int  # of the first target in its prompt
    first_index: int  # where the token before it is among num_tokens; the others follow
    token_ids: Int64Array  # [num_targets]


@dataclass(frozen=True, slots=True)
class StepInputs:
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
    temperatures: NDArray[np.float32]  # [num_sampled]
    uniforms: NDArray[np.float32]  # [num_sampled]
    sampling_options: SamplingOptions | None  # None: no sampled row uses any
    prompt_targets: tuple[PromptTargets, ...]  # empty: nobody asks for prompt_logprobs


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
        temperatures=np.ones(num_seqs, np.float32),
        uniforms=np.zeros(num_seqs, np.float32),
        sampling_options=None,
        prompt_targets=(),
    )


class InputBatch:
    """The rows of the running sequences.

    Args:
        max_num_seqs: rows.
        max_model_len: tokens of the longest sequence.
        block_size: tokens in a KV block.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_blocks = -(-max_model_len // block_size)  # of one sequence
        # One column more: the token that ends a sequence at max_model_len needs no place, but is written with the others.
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.block_tables = np.zeros((max_num_seqs, self.max_blocks), np.int32)
        self.num_blocks = np.zeros(max_num_seqs, np.int32)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_computed_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_prompt_logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int64)
        self.seq_ids = np.zeros(max_num_seqs, np.int64)
        self.sampling = SamplingState(max_num_seqs)
        self._counts = np.arange(1, max_num_seqs + 1)

    def apply(self, batch: ScheduledBatch) -> StepInputs:
        """Take in what changed, and make the inputs of the step."""
        for started in batch.started:
            self._start(started)
        for row, block_id in batch.new_blocks:
            self.block_tables[row, self.num_blocks[row]] = block_id
            self.num_blocks[row] += 1
        return self._make_inputs(batch)

    def append(self, rows: Int64Array, token_ids: Int64Array) -> None:
        """Add one sampled token to each of the sequences in `rows`."""
        lengths = self.num_tokens[rows]
        self.token_ids.reshape(-1)[rows * self.token_ids.shape[1] + lengths] = token_ids
        self.num_tokens[rows] = lengths + 1

    def _start(self, started: StartedSequence) -> None:
        row = started.row
        self.seq_ids[row] = started.seq_id
        self.token_ids[row, : len(started.token_ids)] = started.token_ids
        self.block_tables[row, : len(started.block_table)] = started.block_table
        self.num_blocks[row] = len(started.block_table)
        self.num_tokens[row] = len(started.token_ids)
        self.num_prompt_tokens[row] = started.num_prompt_tokens
        self.num_computed_tokens[row] = started.num_computed_tokens
        wanted = started.sampling_params.prompt_logprobs
        self.num_prompt_logprobs[row] = NO_LOGPROBS if wanted is None else wanted
        self.sampling.start(started)

    def _make_inputs(self, batch: ScheduledBatch) -> StepInputs:
        rows, seqlens_q = batch.rows, batch.num_tokens
        begin = self.num_computed_tokens[rows]
        end = begin + seqlens_q  # the context after this step
        self.num_computed_tokens[rows] = end
        max_seqlen_q, max_context_len = int(seqlens_q.max()), int(end.max())
        # For each token of the step: the sequence it belongs to, and its position there.
        if max_seqlen_q == 1:
            ends, owner, positions = self._counts[: len(rows)], rows, begin
        else:
            ends, owner = np.cumsum(seqlens_q), np.repeat(rows, seqlens_q)
            positions = np.arange(ends[-1]) + np.repeat(end - ends, seqlens_q)
        cu_seqlens_q = np.zeros(len(rows) + 1, np.int32)
        cu_seqlens_q[1:] = ends
        block = positions // self.block_size
        offset = positions - block * self.block_size
        width = -(-max_context_len // self.block_size)
        sampled = (end == self.num_tokens[rows]).nonzero()[0]
        sampled_rows = rows[sampled]
        sampled_lengths = self.num_tokens[sampled_rows]
        return StepInputs(
            input_ids=_gather(self.token_ids, owner, positions).astype(np.int64),
            positions=positions,
            slot_mapping=_gather(self.block_tables, owner, block).astype(np.int64) * self.block_size + offset,
            cu_seqlens_q=cu_seqlens_q,
            context_lens=end.astype(np.int32),
            block_tables=self.block_tables[:, :width].take(rows, axis=0),  # faster than indexing both at once
            max_seqlen_q=max_seqlen_q,
            max_context_len=max_context_len,
            sampled_rows=sampled_rows,
            logits_indices=ends[sampled] - 1,
            temperatures=self.sampling.temperatures[sampled_rows],
            uniforms=self.sampling.uniforms(sampled_rows, sampled_lengths),
            sampling_options=self.sampling.options(sampled_rows, sampled_lengths, self.token_ids),
            prompt_targets=self._prompt_targets(rows, begin, end, cu_seqlens_q) if batch.num_prefill_tokens else (),
        )

    def _prompt_targets(
        self, rows: Int64Array, begin: Int64Array, end: Int64Array, cu_seqlens_q: Int32Array
    ) -> tuple[PromptTargets, ...]:
        targets: list[PromptTargets] = []
        last = np.minimum(end, self.num_prompt_tokens[rows] - 1)  # the last target; the first one is begin + 1
        for index in np.flatnonzero((self.num_prompt_logprobs[rows] != NO_LOGPROBS) & (last > begin)).tolist():
            row, first = rows[index], int(begin[index]) + 1
            targets.append(
                PromptTargets(
                    seq_id=int(self.seq_ids[row]),
                    num_logprobs=int(self.num_prompt_logprobs[row]),
                    first_position=first,
                    first_index=int(cu_seqlens_q[index]),
                    token_ids=self.token_ids[row, first : int(last[index]) + 1].astype(np.int64),
                )
            )
        return tuple(targets)


def _gather(table: Int32Array, rows: Int64Array, columns: Int64Array) -> Int32Array:
    """`table[rows, columns]` of a contiguous table, in half the time."""
    return table.reshape(-1)[rows * table.shape[1] + columns]
