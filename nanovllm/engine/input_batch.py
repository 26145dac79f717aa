"""InputBatch: what one rank knows of the running sequences, and the inputs of a step made of it.

Each running sequence has a row, chosen by the scheduler, in arrays that are allocated once. A scheduled batch changes them
by increments; the inputs of a step are then a few array operations, whatever mixture of prefill chunks and decodes it is.
Nothing needs to be undone when a sequence ends: its row is overwritten by the next that is given it.

While the same sequences decode step after step their state is kept side by side (`DecodeRows`): then a step is fewer still.
"""

from typing import NamedTuple

import numpy as np

from nanovllm.engine.decode_rows import DecodeRows
from nanovllm.engine.sampling_state import NO_LOGPROBS, SamplingState
from nanovllm.engine.scheduled_batch import ScheduledBatch, StartedSequence
from nanovllm.engine.step_inputs import Int32Array, Int64Array, PromptTargets, SamplingInputs, StepInputs


class Sampled(NamedTuple):
    """The sequences that get a token in a step, in batch order."""

    rows: Int64Array
    num_tokens: Int64Array  # before they get it


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
        self.block_tables = np.zeros((max_num_seqs, self.max_blocks), np.int32)
        self.num_blocks = [0] * max_num_seqs
        self.slot_offsets = np.zeros(max_num_seqs, np.int64)  # from a position in the last block to its slot
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_prompt_logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int64)
        self.seq_ids = np.zeros(max_num_seqs, np.int64)
        self.sampling = SamplingState(max_num_seqs)
        # Of rows in `_decodes` these are written when the batch changes:
        self.last_token_ids = np.zeros(max_num_seqs, np.int64)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_computed_tokens = np.zeros(max_num_seqs, np.int64)
        self._decodes: DecodeRows | None = None  # of the last step, if it was one of decodes
        # Of the last step:
        self.sampled = Sampled(np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._has_options = False  # whether any sampled row uses some

    def apply(self, batch: ScheduledBatch) -> StepInputs:
        """Take in what changed, and make the inputs of the step."""
        goes_on = batch.is_decode and not batch.started
        if self._decodes is not None and not (goes_on and self._decodes.are(batch.rows)):
            self._put_back(self._decodes)
            self._decodes = None
        for started in batch.started:
            self._start(started)
        for row, block_id in batch.new_blocks:
            last = self.num_blocks[row]
            self.num_blocks[row] = last + 1
            self.block_tables[row, last] = block_id
            self.slot_offsets[row] = (block_id - last) * self.block_size
        return self._decode(batch) if batch.is_decode else self._compute_chunks(batch)

    def sampling_inputs(self) -> SamplingInputs:
        """How the next tokens are picked, of the sequences whose last token is in the step."""
        rows, num_tokens = self.sampled
        options = self.sampling.options(rows, num_tokens, self.token_ids)
        self._has_options = options is not None
        uniforms = self._decodes.draw(self.sampling) if self._decodes is not None else self.sampling.draw(rows, num_tokens)
        return SamplingInputs(self.sampling.temperatures[rows], uniforms, options)

    def append(self, token_ids: Int64Array) -> None:
        """Add one sampled token to each of the sequences whose last token was in the step, in batch order."""
        rows, num_tokens = self.sampled
        if self._decodes is None:
            self.num_tokens[rows] = num_tokens + 1
            self.last_token_ids[rows] = token_ids
        else:
            self._decodes.append(token_ids)
        if self._has_options:
            edited = self.sampling.is_edited[rows]
            self.token_ids[rows[edited], num_tokens[edited]] = token_ids[edited]

    def _start(self, started: StartedSequence) -> None:
        row = started.row
        self.seq_ids[row] = started.seq_id
        self.token_ids[row, : len(started.token_ids)] = started.token_ids
        self.last_token_ids[row] = started.token_ids[-1]
        self.block_tables[row, : len(started.block_table)] = started.block_table
        self.num_blocks[row] = len(started.block_table)
        self.slot_offsets[row] = (started.block_table[-1] - len(started.block_table) + 1) * self.block_size
        self.num_tokens[row] = len(started.token_ids)
        self.num_prompt_tokens[row] = started.num_prompt_tokens
        self.num_computed_tokens[row] = started.num_computed_tokens
        wanted = started.sampling_params.prompt_logprobs
        self.num_prompt_logprobs[row] = NO_LOGPROBS if wanted is None else wanted
        self.sampling.start(started)

    # ---- a step in which each sequence computes its last token ----

    def _decode(self, batch: ScheduledBatch) -> StepInputs:
        if self._decodes is None:
            rows = batch.rows
            self._decodes = DecodeRows(
                rows=rows,
                input_ids=self.last_token_ids[rows],
                positions=self.num_computed_tokens[rows],
                block_tables=self.block_tables,
                slot_offsets=self.slot_offsets,
            )
        else:
            self._decodes.advance()
            if batch.new_blocks:
                self._decodes.take_blocks(self.block_tables, self.slot_offsets)
        self.sampled = Sampled(batch.rows, self._decodes.num_tokens)
        return self._decodes.inputs(self.block_size)

    def _put_back(self, decodes: DecodeRows) -> None:
        self.num_computed_tokens[decodes.rows] = decodes.num_tokens
        self.num_tokens[decodes.rows] = decodes.num_tokens + 1
        self.last_token_ids[decodes.rows] = decodes.input_ids

    # ---- any other step ----

    def _compute_chunks(self, batch: ScheduledBatch) -> StepInputs:
        """A step in which each sequence computes the tokens from `begin` to `end`."""
        rows, lengths = batch.rows, batch.num_tokens
        begin = self.num_computed_tokens[rows]
        end = begin + lengths  # the context after this step
        self.num_computed_tokens[rows] = end
        ends = lengths.cumsum()
        # For each token of the step: the sequence it belongs to, and its position there.
        owner = rows.repeat(lengths)
        positions = np.arange(ends[-1]) + (end - ends).repeat(lengths)
        block, offset = np.divmod(positions, self.block_size)
        sampled = (end == self.num_tokens[rows]).nonzero()[0]
        self.sampled = Sampled(rows[sampled], end[sampled])
        logits_indices = ends[sampled] - 1
        input_ids = self.token_ids[owner, positions].astype(np.int64)
        input_ids[logits_indices] = self.last_token_ids[self.sampled.rows]
        cu_seqlens_q = np.append(0, ends).astype(np.int32)
        max_context_len = int(end.max())
        return StepInputs(
            input_ids=input_ids,
            positions=positions,
            slot_mapping=self.block_tables[owner, block].astype(np.int64) * self.block_size + offset,
            cu_seqlens_q=cu_seqlens_q,
            context_lens=end.astype(np.int32),
            block_tables=self.block_tables.take(rows, axis=0)[:, : -(-max_context_len // self.block_size)],
            max_seqlen_q=int(lengths.max()),
            max_context_len=max_context_len,
            sampled_rows=self.sampled.rows,
            logits_indices=logits_indices,
            prompt_targets=self._prompt_targets(rows, begin, end, cu_seqlens_q),
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
