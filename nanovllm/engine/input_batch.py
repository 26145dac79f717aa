"""InputBatch: what one rank knows of the running sequences, and the inputs of a step made of it.

Each running sequence has a row, chosen by the scheduler, in arrays that are allocated once. A scheduled batch changes them
by increments; the inputs of a step are then a few array operations, whatever mixture of prefill chunks and decodes it is.
Nothing needs to be undone when a sequence ends: its row is overwritten by the next that is given it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.sampling_state import NO_LOGPROBS, SamplingOptions, SamplingState
from nanovllm.engine.scheduled_batch import ScheduledBatch, StartedSequence

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


class PromptTargets(NamedTuple):
    """Prompt tokens of one sequence whose log-probabilities this step can tell, by the hidden state before each."""

    seq_id: int
    num_logprobs: int
    first_position: int  # of the first target in its prompt
    first_index: int  # where the token before it is among num_tokens; the others follow
    token_ids: Int64Array  # [num_targets]


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


class _Tokens(NamedTuple):
    """The tokens of a step; see `StepInputs`."""

    input_ids: Int64Array
    positions: Int64Array
    slot_mapping: Int64Array
    cu_seqlens_q: Int32Array
    max_seqlen_q: int
    sampled_rows: Int64Array
    logits_indices: Int64Array


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
        # Prompts, and what was generated until the sequence started; what comes after, only of rows that are edited. (Rows
        # lie far apart in memory: writing a token to each takes longer than all the rest of `append`.)
        # One column more: the token that ends a sequence at max_model_len needs no place, but is written with the others.
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.last_token_ids = np.zeros(max_num_seqs, np.int64)
        self.block_tables = np.zeros((max_num_seqs, self.max_blocks), np.int32)
        self.num_blocks = np.zeros(max_num_seqs, np.int32)
        self.slot_offsets = np.zeros(max_num_seqs, np.int64)  # from a position in the last block to its slot
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_computed_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_prompt_logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int64)
        self.seq_ids = np.zeros(max_num_seqs, np.int64)
        self.sampling = SamplingState(max_num_seqs)
        self._step_has_options = False  # whether any sampled row of the last step uses some
        self._indices = np.arange(max_num_seqs)
        self._cu_seqlens = np.arange(max_num_seqs + 1, dtype=np.int32)  # of queries of one token

    def apply(self, batch: ScheduledBatch) -> StepInputs:
        """Take in what changed, and make the inputs of the step."""
        for started in batch.started:
            self._start(started)
        for row, block_id in batch.new_blocks:
            self.block_tables[row, self.num_blocks[row]] = block_id
            self.num_blocks[row] += 1
            self._find_last_block(row)
        return self._make_inputs(batch)

    def sampling_inputs(self, rows: Int64Array) -> SamplingInputs:
        """How the next tokens of `rows` are picked. To be called once for each token, by the rank that samples."""
        options = self.sampling.options(rows, self.num_tokens, self.token_ids)
        self._step_has_options = options is not None
        return SamplingInputs(self.sampling.temperatures[rows], self.sampling.draw(rows), options)

    def append(self, rows: Int64Array, token_ids: Int64Array) -> None:
        """Add one sampled token to each of the sequences in `rows`."""
        lengths = self.num_tokens[rows]
        self.num_tokens[rows] = lengths + 1
        self.last_token_ids[rows] = token_ids
        if self._step_has_options:
            edited = self.sampling.is_edited[rows]
            self.token_ids[rows[edited], lengths[edited]] = token_ids[edited]

    def _start(self, started: StartedSequence) -> None:
        row = started.row
        self.seq_ids[row] = started.seq_id
        self.token_ids[row, : len(started.token_ids)] = started.token_ids
        self.last_token_ids[row] = started.token_ids[-1]
        self.block_tables[row, : len(started.block_table)] = started.block_table
        self.num_blocks[row] = len(started.block_table)
        self._find_last_block(row)
        self.num_tokens[row] = len(started.token_ids)
        self.num_prompt_tokens[row] = started.num_prompt_tokens
        self.num_computed_tokens[row] = started.num_computed_tokens
        wanted = started.sampling_params.prompt_logprobs
        self.num_prompt_logprobs[row] = NO_LOGPROBS if wanted is None else wanted
        self.sampling.start(started)

    def _find_last_block(self, row: int) -> None:
        last = int(self.num_blocks[row]) - 1
        self.slot_offsets[row] = (int(self.block_tables[row, last]) - last) * self.block_size

    def _make_inputs(self, batch: ScheduledBatch) -> StepInputs:
        rows = batch.rows
        begin = self.num_computed_tokens[rows]
        end = begin + batch.num_tokens  # the context after this step
        self.num_computed_tokens[rows] = end
        tokens = self._last_tokens(rows, begin) if batch.is_decode else self._chunks(rows, begin, end)
        max_context_len = int(end.max())
        return StepInputs(
            input_ids=tokens.input_ids,
            positions=tokens.positions,
            slot_mapping=tokens.slot_mapping,
            cu_seqlens_q=tokens.cu_seqlens_q,
            context_lens=end.astype(np.int32),
            block_tables=self.block_tables.take(rows, axis=0)[:, : -(-max_context_len // self.block_size)],
            max_seqlen_q=tokens.max_seqlen_q,
            max_context_len=max_context_len,
            sampled_rows=tokens.sampled_rows,
            logits_indices=tokens.logits_indices,
            prompt_targets=() if batch.is_decode else self._prompt_targets(rows, begin, end, tokens.cu_seqlens_q),
        )

    def _last_tokens(self, rows: Int64Array, positions: Int64Array) -> "_Tokens":
        """A step in which each sequence computes its last token."""
        return _Tokens(
            input_ids=self.last_token_ids[rows],
            positions=positions,
            slot_mapping=positions + self.slot_offsets[rows],
            cu_seqlens_q=self._cu_seqlens[: len(rows) + 1],
            max_seqlen_q=1,
            sampled_rows=rows,
            logits_indices=self._indices[: len(rows)],
        )

    def _chunks(self, rows: Int64Array, begin: Int64Array, end: Int64Array) -> "_Tokens":
        """A step in which each sequence computes the tokens from `begin` to `end`."""
        lengths = end - begin
        ends = lengths.cumsum()
        # For each token of the step: the sequence it belongs to, and its position there.
        owner = rows.repeat(lengths)
        positions = np.arange(ends[-1]) + (end - ends).repeat(lengths)
        block, offset = np.divmod(positions, self.block_size)
        sampled = (end == self.num_tokens[rows]).nonzero()[0]
        logits_indices = ends[sampled] - 1
        input_ids = self.token_ids[owner, positions].astype(np.int64)
        input_ids[logits_indices] = self.last_token_ids[rows[sampled]]
        return _Tokens(
            input_ids=input_ids,
            positions=positions,
            slot_mapping=self.block_tables[owner, block].astype(np.int64) * self.block_size + offset,
            cu_seqlens_q=np.append(0, ends).astype(np.int32),
            max_seqlen_q=int(lengths.max()),
            sampled_rows=rows[sampled],
            logits_indices=logits_indices,
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
