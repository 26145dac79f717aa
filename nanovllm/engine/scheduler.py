"""Scheduler: what runs in the next step, and what came of the last.

Each step is one batch: every running sequence goes on, oldest first (one token in decode, a chunk in prefill), then
waiting sequences are admitted in order of arrival while the token budget, the number of sequences and the free KV blocks
allow. A sequence is admitted with blocks for all its tokens, so only decoding can run out of blocks; then the newest
running sequence is preempted: it gives its blocks back, waits again, and later starts from its tokens so far.

The oldest sequence is never preempted for another, and every request is known to fit alone: so some always finishes.

A running sequence has a row: its index in the arrays that say how far it is, here and in the model runners. What happens
to all sequences in every step is done on the arrays; Python loops only over those to which something special happens.
"""

import time
from collections import deque
from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduled_batch import IntArray, ScheduledBatch, StartedSequence
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import FinishReason
from nanovllm.sampling_params import SamplingParams


class Scheduler:
    """Decides what runs; owns the queues and the block manager.

    Args:
        block_manager: the KV blocks to hand out.
        max_num_seqs: sequences that run at the same time at most.
        max_num_batched_tokens: tokens in one batch at most.
        eos_token_ids: tokens that end a sequence.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.num_preemptions = 0
        # By row:
        self.num_tokens = np.zeros(max_num_seqs, np.int64)  # prompt and output
        self.num_computed_tokens = np.zeros(max_num_seqs, np.int64)  # of these, whose K and V are in the cache
        self.next_full_block = np.zeros(max_num_seqs, np.int64)  # as many computed tokens will fill the next block
        self.capacity = np.zeros(max_num_seqs, np.int64)  # tokens that the sequence's blocks can hold
        self.max_total_tokens = np.zeros(max_num_seqs, np.int64)
        self.in_prefill = np.zeros(max_num_seqs, np.bool_)  # no token was sampled since it started, or started again
        self._one_each = np.ones(max_num_seqs, np.int64)
        self._one_each.flags.writeable = False  # batches are views of it
        self._stop_token_ids = set(eos_token_ids)  # of all requests so far
        self.reset()

    def reset(self) -> None:
        """Drop every request and free every block, after an exception at any point of a step."""
        self.waiting: deque[Sequence] = deque()  # both queues are in order of arrival
        self._set_running([], np.zeros(0, np.int64))
        self._free_rows = list(range(self.max_num_seqs))
        self.block_manager.reset()

    def _set_running(self, sequences: list[Sequence], rows: IntArray) -> None:
        self.running = sequences
        self._rows = rows  # [len(running)]
        self._appends = [seq.token_ids.append for seq in sequences]  # bound once, called in every step

    def is_finished(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        """Queue a sequence, of which the caller knows that the KV cache can hold it to its end."""
        self.waiting.append(seq)

    # ---- before a step ----

    def schedule(self) -> ScheduledBatch:
        """Choose the next batch. At least one sequence must be waiting or running."""
        budget = self.max_num_batched_tokens
        num_tokens = self._share(self._rows, budget)
        new_blocks = self._make_room(num_tokens)
        started: list[StartedSequence] = []
        # One that was just preempted would fit again at once, only to be preempted again.
        preempted = len(self.running) < len(num_tokens)
        num_tokens = num_tokens[: len(self.running)]
        total = int(num_tokens.sum())
        if self.waiting and not preempted and total < budget:
            started = self._admit(budget - total)
        if started:
            num_tokens = np.append(num_tokens, self._share(self._rows[len(num_tokens) :], budget - total))
            num_tokens = num_tokens[self._sort_running()]
            total = int(num_tokens.sum())
        # Where the budget is used up the newest get nothing: the batch is a prefix of the running ones.
        size = len(num_tokens) if total < budget else int(np.count_nonzero(num_tokens))
        assert size, "nothing can run: a request was added that the KV cache cannot hold"
        rows = self._rows[:size]
        num_decode = size - int(np.count_nonzero(self.in_prefill[rows]))
        return ScheduledBatch(
            started=tuple(started),
            new_blocks=tuple(new_blocks),
            rows=rows,
            num_tokens=num_tokens[:size],
            num_prefill_tokens=total - num_decode,
            num_decode_tokens=num_decode,
        )

    def _share(self, rows: IntArray, budget: int) -> IntArray:
        """[len(rows)]: how many tokens of each to compute, the first of them first, until the budget is used up."""
        if len(rows) <= budget and not np.count_nonzero(self.in_prefill[rows]):
            return self._one_each[: len(rows)]
        left: IntArray = self.num_tokens[rows] - self.num_computed_tokens[rows]
        return np.clip(budget - (np.cumsum(left) - left), 0, left)

    def _make_room(self, num_tokens: IntArray) -> list[tuple[int, int]]:
        """Give a block to each sequence that will run and whose blocks are full, preempting the newest where none is free.

        num_tokens: [len(running)], to compute of each.
        """
        new_blocks: list[tuple[int, int]] = []
        for position in (self.num_tokens[self._rows] > self.capacity[self._rows]).nonzero()[0].tolist():
            if num_tokens[position] == 0:
                break  # nor will those after it run
            while position < len(self.running) and self.block_manager.num_free_blocks == 0:
                self._preempt_newest()
            if position >= len(self.running):
                break  # it was the newest itself
            row = int(self._rows[position])
            new_blocks.append((row, self.block_manager.extend(self.running[position])))
            self.capacity[row] += self.block_manager.block_size
        return new_blocks

    def _preempt_newest(self) -> None:
        seq = self.running[-1]
        self._free_rows.append(int(self._rows[-1]))
        self._set_running(self.running[:-1], self._rows[:-1])
        self.block_manager.free(seq)
        self.num_preemptions += 1
        # Nearly always the front: only sequences that were passed over in `_admit` can be older.
        position = 0
        while position < len(self.waiting) and self.waiting[position].seq_id < seq.seq_id:
            position += 1
        self.waiting.insert(position, seq)

    def _admit(self, budget: int) -> list[StartedSequence]:
        """Move waiting sequences to the running ones while there is room; they have their blocks then.

        One whose next block is being computed for another sequence is passed over: in a later step it will share it.
        """
        started: list[StartedSequence] = []
        admitted: list[Sequence] = []
        passed_over: list[Sequence] = []
        room = self.max_num_seqs - len(self.running)
        while self.waiting and budget > 0 and len(admitted) + len(passed_over) < room:
            seq = self.waiting[0]
            # A cached token has no hidden state, of which the log-probabilities of the next are made.
            hits = [] if seq.needs_prompt_logprobs else self.block_manager.find_prefix(seq)
            if not seq.needs_prompt_logprobs and self.block_manager.is_next_block_being_computed(seq, len(hits)):
                passed_over.append(self.waiting.popleft())
                continue
            if not self.block_manager.can_allocate(seq, hits):
                break
            started.append(self._start(seq, self.block_manager.allocate(seq, hits)))
            admitted.append(self.waiting.popleft())
            budget -= len(seq) - started[-1].num_computed_tokens
        self.waiting.extendleft(reversed(passed_over))
        if started:
            self._set_running(self.running + admitted, np.append(self._rows, [new.row for new in started]))
        return started

    def _start(self, seq: Sequence, num_computed_tokens: int) -> StartedSequence:
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_computed_tokens
        row, block_size, params = self._free_rows.pop(), self.block_manager.block_size, seq.sampling_params
        self.num_tokens[row] = len(seq)
        self.num_computed_tokens[row] = num_computed_tokens
        self.next_full_block[row] = num_computed_tokens + block_size  # only full blocks are found
        self.capacity[row] = len(seq.block_table) * block_size
        self.max_total_tokens[row] = seq.max_total_tokens
        self.in_prefill[row] = True
        self._stop_token_ids.update(params.stop_token_ids)
        return StartedSequence(
            row=row,
            seq_id=seq.seq_id,
            token_ids=seq.token_ids[:],
            num_prompt_tokens=seq.num_prompt_tokens,
            num_computed_tokens=num_computed_tokens,
            block_table=tuple(seq.block_table),
            sampling_params=params,
            seed=seq.seed,
            stop_token_ids=tuple(sorted(self.stop_token_ids(params))) if params.min_tokens else (),
        )

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a sequence with these parameters."""
        return frozenset(params.stop_token_ids) if params.ignore_eos else self.eos_token_ids.union(params.stop_token_ids)

    def _sort_running(self) -> list[int]:
        """Restore the order of arrival: one that had been passed over may be older than some that run.

        Returns:
            The old position of each.
        """
        order = sorted(range(len(self.running)), key=lambda position: self.running[position].seq_id)
        self._set_running([self.running[position] for position in order], self._rows[order])
        return order

    # ---- after a step ----

    def update(self, batch: ScheduledBatch, token_ids: NDArray[np.integer]) -> list[Sequence]:
        """Take in what a step computed.

        Args:
            batch: what `schedule` returned last.
            token_ids: one sampled token for each sequence of the batch whose last token was computed, in batch order.

        Returns:
            The sequences that finished, their blocks freed.
        """
        rows = batch.rows
        sequences = self.sampled_sequences(batch)
        assert len(sequences) == len(token_ids), "as many tokens are sampled as sequences had their last token computed"
        computed = self.num_computed_tokens[rows] + batch.num_tokens
        self.num_computed_tokens[rows] = computed
        # Positions in the batch are positions in `running`, of which it is a prefix.
        for position in (computed >= self.next_full_block[rows]).nonzero()[0].tolist():
            self._publish(position)
        appends = self._appends
        if not batch.is_decode:
            appends = [seq.token_ids.append for seq in sequences]
            rows = rows[computed == self.num_tokens[rows]]
            self.in_prefill[rows] = False
            _note_first_token(sequences)
        sampled = token_ids.tolist()
        for append, token_id in zip(appends, sampled, strict=False):  # some that run may not be in the batch
            append(token_id)
        return self._finish(sequences, rows, sampled)

    def sampled_sequences(self, batch: ScheduledBatch) -> list[Sequence]:
        """Those whose last token is in the batch, in its order. To be called before `update`."""
        if batch.is_decode:
            return self.running[: len(batch.rows)]
        computed = self.num_computed_tokens[batch.rows] + batch.num_tokens
        return [self.running[position] for position in np.flatnonzero(computed == self.num_tokens[batch.rows])]

    def _publish(self, position: int) -> None:
        row, block_size = self._rows[position], self.block_manager.block_size
        num_computed_tokens = int(self.num_computed_tokens[row])
        self.block_manager.publish(self.running[position], num_computed_tokens)
        self.next_full_block[row] = (num_computed_tokens // block_size + 1) * block_size

    def _finish(self, sequences: list[Sequence], rows: IntArray, sampled: list[int]) -> list[Sequence]:
        """End those of `sequences` that are through: each has just sampled a token."""
        num_tokens = self.num_tokens[rows] + 1
        self.num_tokens[rows] = num_tokens
        ended = set((num_tokens >= self.max_total_tokens[rows]).nonzero()[0].tolist())
        if not self._stop_token_ids.isdisjoint(sampled):
            ended.update(index for index, token_id in enumerate(sampled) if token_id in self._stop_token_ids)
        finished: list[Sequence] = []
        for index in sorted(ended):
            seq, token_id = sequences[index], sampled[index]
            seq.ended_at_stop_token = token_id in self.stop_token_ids(seq.sampling_params)
            if seq.ended_at_stop_token or len(seq) >= seq.max_total_tokens:
                seq.finish_reason = "stop" if seq.ended_at_stop_token else "length"
                ends_at_eos = token_id in self.eos_token_ids and not seq.sampling_params.ignore_eos
                seq.stop_reason = token_id if seq.ended_at_stop_token and not ends_at_eos else None
                finished.append(seq)
        self._release(finished)
        return finished

    def end(self, sequences: Collection[Sequence], reason: FinishReason) -> None:
        """End sequences before their time, whether they wait or run; between two steps."""
        for seq in sequences:
            assert seq.finish_reason is None, f"request {seq.seq_id} has ended before"
            seq.finish_reason = reason
        num_running = len(self.running)
        self._release(sequences)
        if num_running - len(self.running) < len(sequences):  # some waited; looking for them takes a while
            self.waiting = deque(seq for seq in self.waiting if seq.finish_reason is None)

    def _release(self, ended: Collection[Sequence]) -> None:
        """Take back blocks and rows of sequences that have a finish reason."""
        if not ended:
            return
        now = time.perf_counter()
        for seq in ended:
            seq.finish_time = now
            self.block_manager.free(seq)
        goes_on = np.array([seq.finish_reason is None for seq in self.running], np.bool_)
        self._free_rows.extend(self._rows[~goes_on].tolist())
        self._set_running([seq for seq in self.running if seq.finish_reason is None], self._rows[goes_on])


def _note_first_token(sequences: Iterable[Sequence]) -> None:
    now = time.perf_counter()
    for seq in sequences:
        if seq.first_token_time is None:
            seq.first_token_time = now
