"""InputBatch: what one rank knows of the running sequences, and the inputs of a step made of it.

Each running sequence has a row, chosen by the scheduler, in arrays that are allocated once. A scheduled batch changes them
by increments; the inputs of a step are then a few array operations, whatever mixture of prefill chunks and decodes it is.
Nothing needs to be undone when a sequence ends: its row is overwritten by the next that is given it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.scheduler import ScheduledBatch, StartedSequence
from nanovllm.layers.sampler import start_stream, uniform_of

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


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
        self.temperatures = np.zeros(max_num_seqs, np.float32)
        self.streams = np.zeros(max_num_seqs, np.uint64)  # of random numbers, by the seed of each
        self.seq_ids = np.zeros(max_num_seqs, np.int64)
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
        self.temperatures[row] = started.sampling_params.temperature
        self.streams[row] = start_stream(np.uint64(started.seed))[0]

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
        output_positions = self.num_tokens[sampled_rows] - self.num_prompt_tokens[sampled_rows]
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
            temperatures=self.temperatures[sampled_rows],
            uniforms=uniform_of(self.streams[sampled_rows], output_positions.astype(np.uint64)),
        )


def _gather(table: Int32Array, rows: Int64Array, columns: Int64Array) -> Int32Array:
    """`table[rows, columns]` of a contiguous table, in half the time."""
    return table.reshape(-1)[rows * table.shape[1] + columns]
