"""Scheduler: what runs in the next step, and what came of the last.

Each step is one batch: every running sequence goes on, oldest first (one token in decode, a chunk in prefill), then
waiting sequences are admitted in order of arrival while the token budget, the number of sequences and the free KV blocks
allow. A sequence is admitted with blocks for all its tokens, so only decoding can run out of blocks; then the newest
running sequence is preempted: it gives its blocks back, waits again, and later starts from its tokens so far.

The oldest sequence is never preempted for another, and every request is known to fit alone: so some always finishes.

How far each running sequence is, its counts, is kept in arrays (`Running`).
"""

import time
from collections import deque
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.running import Positions, Running
from nanovllm.engine.scheduled_batch import IntArray, ScheduledBatch, StartedSequence
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stop_tokens import StopTokens
from nanovllm.outputs import FinishReason


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
        self.stop_tokens = StopTokens(eos_token_ids)
        self.num_preemptions = 0
        self._one_each = np.ones(max_num_seqs, np.int64)
        self._one_each.flags.writeable = False  # batches are views of it
        self.reset()

    def reset(self) -> None:
        """Drop every request and free every block, after an exception at any point of a step."""
        self.waiting: deque[Sequence] = deque()  # in order of arrival, as those that run
        self.running = Running(self.max_num_seqs, self.block_manager.block_size)
        self.block_manager.reset()

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
        num_tokens = self._share()
        new_blocks = self._make_room(num_tokens)
        started: list[StartedSequence] = []
        # One that was just preempted would fit again at once, only to be preempted again.
        preempted = len(self.running) < len(num_tokens)
        num_tokens = num_tokens[: len(self.running)]
        total = int(num_tokens.sum())
        if self.waiting and not preempted and total < budget:
            started = self._admit(budget - total)
        if started:
            num_tokens = self._share()
            total = int(num_tokens.sum())
        # Where the budget is used up the newest get nothing: the batch is a prefix of the running ones.
        size = len(num_tokens) if total < budget else int(np.count_nonzero(num_tokens))
        assert size, "nothing can run: a request was added that the KV cache cannot hold"
        counts = self.running.counts
        num_decode = size - int(np.count_nonzero(counts.in_prefill[:size]))
        return ScheduledBatch(
            started=tuple(started),
            new_blocks=tuple(new_blocks),
            rows=counts.row if size == len(counts.row) else counts.row[:size],
            num_tokens=num_tokens[:size],
            num_prefill_tokens=total - num_decode,
            num_decode_tokens=num_decode,
        )

    def _share(self) -> IntArray:
        """[len(running)]: how many tokens of each to compute, of the oldest first, until the budget is used up."""
        counts, budget = self.running.counts, self.max_num_batched_tokens
        if len(self.running) <= budget and not np.count_nonzero(counts.in_prefill):
            return self._one_each[: len(self.running)]
        left: IntArray = counts.num_tokens - counts.num_computed
        return np.clip(budget - (np.cumsum(left) - left), 0, left)

    def _make_room(self, num_tokens: IntArray) -> list[tuple[int, int]]:
        """Give a block to each sequence that will run and whose blocks are full, preempting the newest where none is free.

        num_tokens: [len(running)], to compute of each.
        """
        new_blocks: list[tuple[int, int]] = []
        counts = self.running.counts
        for position in (counts.num_tokens > counts.capacity).nonzero()[0].tolist():
            if num_tokens[position] == 0:
                break  # nor will those after it run
            while position < len(self.running) and self.block_manager.num_free_blocks == 0:
                self._preempt_newest()
            if position >= len(self.running):
                break  # it was the newest itself
            counts = self.running.counts
            new_blocks.append((int(counts.row[position]), self.block_manager.extend(self.running[position])))
            counts.capacity[position] += self.block_manager.block_size
        return new_blocks

    def _preempt_newest(self) -> None:
        (seq,) = self.running.remove([len(self.running) - 1])
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
        admitted: list[Sequence] = []
        started: list[StartedSequence] = []
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
            self.running.add(admitted, started)
        return started

    def _start(self, seq: Sequence, num_computed_tokens: int) -> StartedSequence:
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_computed_tokens
        params = seq.sampling_params
        self.stop_tokens.watch(params)
        return StartedSequence(
            row=self.running.free_rows.pop(),
            seq_id=seq.seq_id,
            token_ids=seq.token_ids[:],
            num_prompt_tokens=seq.num_prompt_tokens,
            num_computed_tokens=num_computed_tokens,
            block_table=tuple(seq.block_table),
            sampling_params=params,
            seed=seq.seed,
            stop_token_ids=tuple(sorted(self.stop_tokens.of(params))) if params.min_tokens else (),
        )

    # ---- after a step ----

    def update(self, batch: ScheduledBatch, token_ids: NDArray[np.integer]) -> list[Sequence]:
        """Take in what a step computed.

        Args:
            batch: what `schedule` returned last.
            token_ids: one sampled token for each sequence of the batch whose last token was computed, in batch order.

        Returns:
            The sequences that finished, their blocks freed.
        """
        counts, size, sampled = self.running.counts, len(batch.rows), self._sampled(batch)
        assert len(counts.row[sampled]) == len(token_ids), "one token is sampled of each whose last token was computed"
        computed = counts.num_computed[:size]
        computed += batch.num_tokens
        for position in (computed >= counts.next_full_block[:size]).nonzero()[0].tolist():
            self._publish(position)
        if not batch.is_decode:
            counts.in_prefill[sampled] = 0
            self._note_first_token(sampled)
        self.running.add_tokens(sampled, token_ids)
        return self._finish(sampled, token_ids)

    def sampled_sequences(self, batch: ScheduledBatch) -> list[Sequence]:
        """Those whose last token is in the batch, in its order. To be called before `update`."""
        return [self.running[position] for position in self._indices(self._sampled(batch)).tolist()]

    def _sampled(self, batch: ScheduledBatch) -> Positions:
        """Their positions. Those of the batch are the first of the running ones."""
        size = len(batch.rows)
        if batch.is_decode:
            return slice(size)
        counts = self.running.counts
        return np.flatnonzero(counts.num_computed[:size] + batch.num_tokens == counts.num_tokens[:size])

    def _indices(self, positions: Positions) -> IntArray:
        return np.arange(len(self.running))[positions]

    def _publish(self, position: int) -> None:
        counts, block_size = self.running.counts, self.block_manager.block_size
        num_computed = int(counts.num_computed[position])
        self.block_manager.publish(self.running.up_to_date(position), num_computed)
        counts.next_full_block[position] = (num_computed // block_size + 1) * block_size

    def _note_first_token(self, positions: Positions) -> None:
        now = time.perf_counter()
        for position in self._indices(positions).tolist():
            if self.running[position].first_token_time is None:
                self.running[position].first_token_time = now

    def _finish(self, positions: Positions, token_ids: NDArray[np.integer]) -> list[Sequence]:
        """End those at `positions` that are through: each has just sampled one of `token_ids`."""
        counts = self.running.counts
        ended = counts.num_tokens[positions] >= counts.max_total_tokens[positions]
        ended |= self.stop_tokens.among(token_ids)
        if not np.count_nonzero(ended):
            return []
        finished: list[int] = []
        where = self._indices(positions)[ended]
        for position, token_id in zip(where.tolist(), token_ids[ended].tolist(), strict=True):
            seq = self.running[position]
            seq.ended_at_stop_token = token_id in self.stop_tokens.of(seq.sampling_params)
            if seq.ended_at_stop_token or counts.num_tokens[position] >= seq.max_total_tokens:
                seq.finish_reason = "stop" if seq.ended_at_stop_token else "length"
                ends_at_eos = token_id in self.stop_tokens.eos_token_ids and not seq.sampling_params.ignore_eos
                seq.stop_reason = token_id if seq.ended_at_stop_token and not ends_at_eos else None
                finished.append(position)
        return self._release(finished)

    def end(self, sequences: Collection[Sequence], reason: FinishReason) -> None:
        """End sequences before their time, whether they wait or run; between two steps."""
        for seq in sequences:
            assert seq.finish_reason is None, f"request {seq.seq_id} has ended before"
            seq.finish_reason = reason
            seq.finish_time = time.perf_counter()
        running = self._release([position for position, seq in enumerate(self.running) if seq.finish_reason is not None])
        if len(running) < len(sequences):  # some waited; looking for them takes a while
            self.waiting = deque(seq for seq in self.waiting if seq.finish_reason is None)

    def _release(self, positions: list[int]) -> list[Sequence]:
        """Take back blocks and rows of running sequences that have a finish reason."""
        ended = self.running.remove(positions) if positions else []
        for seq in ended:
            seq.finish_time = time.perf_counter()
            self.block_manager.free(seq)
        return ended
