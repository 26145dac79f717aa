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
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import FinishReason
from nanovllm.sampling_params import SamplingParams

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StartedSequence:
    """A sequence that joins the running ones: all that a model runner needs to know of it."""

    row: int  # what was in this row before has ended
    seq_id: int
    token_ids: tuple[int, ...]  # prompt and, after a preemption, output so far
    num_prompt_tokens: int
    num_computed_tokens: int  # found in the prefix cache
    block_table: tuple[int, ...]
    sampling_params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...] = ()  # what min_tokens forbids at first


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledBatch:
    """One step, as increments to what the model runners know already. To be applied in this order."""

    started: tuple[StartedSequence, ...]
    new_blocks: tuple[tuple[int, int], ...]  # (row of a sequence that goes on, block appended to its table)
    rows: IntArray  # [num_seqs]: the batch, in order of arrival
    num_tokens: IntArray  # [num_seqs]: tokens to compute of each, at least 1
    num_prefill_tokens: int  # of these, tokens of prompts and of sequences that start again
    num_decode_tokens: int  # and the others, one for each sequence that decodes


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
        self.eos_token_ids = np.array(sorted(eos_token_ids), np.int64)
        self.num_preemptions = 0
        # By row:
        self.num_tokens = np.zeros(max_num_seqs, np.int64)  # prompt and output
        self.num_computed_tokens = np.zeros(max_num_seqs, np.int64)  # of these, whose K and V are in the cache
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.max_total_tokens = np.zeros(max_num_seqs, np.int64)
        self.capacity = np.zeros(max_num_seqs, np.int64)  # tokens that the sequence's blocks can hold
        self.ends_at_eos = np.zeros(max_num_seqs, np.bool_)
        self.ends_at_others = np.zeros(max_num_seqs, np.bool_)  # at stop_token_ids of its own
        self.reset()

    def reset(self) -> None:
        """Drop every request and free every block, after an exception at any point of a step."""
        self.waiting: deque[Sequence] = deque()  # both queues are in order of arrival
        self.running: list[Sequence] = []
        self._rows = np.zeros(0, np.int64)  # [len(running)]
        self._free_rows = list(range(self.max_num_seqs))
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
        num_tokens = self._share(self._rows, self.max_num_batched_tokens)
        new_blocks = self._make_room(num_tokens)
        started: list[StartedSequence] = []
        # One that was just preempted would fit again at once, only to be preempted again.
        preempted = len(self.running) < len(num_tokens)
        num_tokens = num_tokens[: len(self.running)]
        budget = self.max_num_batched_tokens - int(num_tokens.sum())
        if self.waiting and budget and not preempted:
            started = self._admit(budget)
        if started:
            num_tokens = np.append(num_tokens, self._share(self._rows[len(num_tokens) :], budget))
            num_tokens = num_tokens[self._sort_running()]
        # Where the budget is used up the newest get nothing: the batch is a prefix of the running ones.
        size = int(np.count_nonzero(num_tokens))
        assert size, "nothing can run: a request was added that the KV cache cannot hold"
        rows, num_tokens = self._rows[:size], num_tokens[:size]
        left = self.num_tokens[rows] - self.num_computed_tokens[rows]
        num_decode = int(np.count_nonzero((left == 1) & (self.num_tokens[rows] > self.num_prompt_tokens[rows])))
        return ScheduledBatch(
            started=tuple(started),
            new_blocks=tuple(new_blocks),
            rows=rows,
            num_tokens=num_tokens,
            num_prefill_tokens=int(num_tokens.sum()) - num_decode,
            num_decode_tokens=num_decode,
        )

    def _share(self, rows: IntArray, budget: int) -> IntArray:
        """[len(rows)]: how many tokens of each to compute, the first of them first, until the budget is used up."""
        left: IntArray = self.num_tokens[rows] - self.num_computed_tokens[rows]
        if left.sum() <= budget:
            return left
        return np.clip(budget - (np.cumsum(left) - left), 0, left)

    def _make_room(self, num_tokens: IntArray) -> list[tuple[int, int]]:
        """Give a block to each sequence that will run and whose blocks are full, preempting the newest where none is free.

        num_tokens: [len(running)], to compute of each.
        """
        new_blocks: list[tuple[int, int]] = []
        full = (num_tokens > 0) & (self.num_tokens[self._rows] > self.capacity[self._rows])
        for position in full.nonzero()[0].tolist():
            while position < len(self.running) and self.block_manager.num_free_blocks == 0:
                self._preempt_newest()
            if position >= len(self.running):
                break  # it was the newest itself
            row = int(self._rows[position])
            new_blocks.append((row, self.block_manager.extend(self.running[position])))
            self.capacity[row] += self.block_manager.block_size
        return new_blocks

    def _preempt_newest(self) -> None:
        seq = self.running.pop()
        self._free_rows.append(int(self._rows[-1]))
        self._rows = self._rows[:-1]
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
        passed_over: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) + len(passed_over) < self.max_num_seqs:
            seq = self.waiting[0]
            # A cached token has no hidden state, of which the log-probabilities of the next are made.
            hits = [] if seq.needs_prompt_logprobs else self.block_manager.find_prefix(seq)
            if not seq.needs_prompt_logprobs and self.block_manager.is_next_block_being_computed(seq, len(hits)):
                passed_over.append(self.waiting.popleft())
                continue
            if not self.block_manager.can_allocate(seq, hits):
                break
            started.append(self._start(seq, self.block_manager.allocate(seq, hits)))
            self.running.append(self.waiting.popleft())
            budget -= len(seq) - started[-1].num_computed_tokens
        self.waiting.extendleft(reversed(passed_over))
        self._rows = np.append(self._rows, np.array([new.row for new in started], np.int64))
        return started

    def _start(self, seq: Sequence, num_computed_tokens: int) -> StartedSequence:
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_computed_tokens
        row = self._free_rows.pop()
        self.num_tokens[row] = len(seq)
        self.num_computed_tokens[row] = num_computed_tokens
        self.num_prompt_tokens[row] = seq.num_prompt_tokens
        self.max_total_tokens[row] = seq.max_total_tokens
        self.capacity[row] = len(seq.block_table) * self.block_manager.block_size
        params = seq.sampling_params
        self.ends_at_eos[row] = not params.ignore_eos
        self.ends_at_others[row] = bool(params.stop_token_ids)
        return StartedSequence(
            row=row,
            seq_id=seq.seq_id,
            token_ids=tuple(seq.token_ids),
            num_prompt_tokens=seq.num_prompt_tokens,
            num_computed_tokens=num_computed_tokens,
            block_table=tuple(seq.block_table),
            sampling_params=params,
            seed=seq.seed,
            stop_token_ids=self._stop_token_ids(seq) if params.min_tokens else (),
        )

    def _stop_token_ids(self, seq: Sequence) -> tuple[int, ...]:
        eos = () if seq.sampling_params.ignore_eos else self.eos_token_ids.tolist()
        return tuple(sorted({*eos, *seq.sampling_params.stop_token_ids}))

    def _sort_running(self) -> list[int]:
        """Restore the order of arrival: one that had been passed over may be older than some that run.

        Returns:
            The old position of each.
        """
        order = sorted(range(len(self.running)), key=lambda position: self.running[position].seq_id)
        self.running = [self.running[position] for position in order]
        self._rows = self._rows[order]
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
        rows, block_size = batch.rows, self.block_manager.block_size
        before = self.num_computed_tokens[rows]
        computed = before + batch.num_tokens
        self.num_computed_tokens[rows] = computed
        # Positions in the batch are positions in `running`, of which it is a prefix.
        for position in (computed // block_size > before // block_size).nonzero()[0].tolist():
            self.block_manager.publish(self.running[position], int(computed[position]))
        sampled = (computed == self.num_tokens[rows]).nonzero()[0]
        assert len(sampled) == len(token_ids), "as many tokens are sampled as sequences had their last token computed"
        running = self.running
        for position, token_id in zip(sampled.tolist(), token_ids.tolist(), strict=True):
            running[position].token_ids.append(token_id)
        if batch.num_prefill_tokens:
            for position in sampled[self.num_tokens[rows[sampled]] == self.num_prompt_tokens[rows[sampled]]].tolist():
                running[position].first_token_time = time.perf_counter()
        return self._finish(sampled, rows[sampled], token_ids)

    def sampled_sequences(self, batch: ScheduledBatch) -> list[Sequence]:
        """Those whose last token is in the batch, in its order. To be called before `update`."""
        computed = self.num_computed_tokens[batch.rows] + batch.num_tokens
        return [self.running[position] for position in np.flatnonzero(computed == self.num_tokens[batch.rows])]

    def _finish(self, positions: IntArray, rows: IntArray, token_ids: NDArray[np.integer]) -> list[Sequence]:
        """End the sequences that sampled `token_ids` and are through."""
        num_tokens = self.num_tokens[rows] + 1
        self.num_tokens[rows] = num_tokens
        stopped = np.zeros(len(rows), np.bool_)
        for eos in self.eos_token_ids:  # one or two: `isin` would take ten times as long
            stopped |= token_ids == eos
        stopped &= self.ends_at_eos[rows]
        if (others := self.ends_at_others[rows]).any():
            for index in np.flatnonzero(others & ~stopped).tolist():
                seq = self.running[positions[index]]
                if token_ids[index] in seq.sampling_params.stop_token_ids:
                    seq.stop_reason = int(token_ids[index])
                    stopped[index] = True
        ended = (stopped | (num_tokens >= self.max_total_tokens[rows])).nonzero()[0]
        if len(ended) == 0:
            return []
        finished = [self.running[position] for position in positions[ended].tolist()]
        for seq, at_token in zip(finished, stopped[ended].tolist(), strict=True):
            seq.ended_at_stop_token = at_token
            seq.finish_reason = "stop" if at_token else "length"
        self._release(positions[ended])
        return finished

    def end(self, sequences: Collection[Sequence], reason: FinishReason) -> None:
        """End sequences before their time, whether they wait or run; between two steps."""
        for seq in sequences:
            assert seq.finish_reason is None, f"request {seq.seq_id} has ended before"
            seq.finish_reason = reason
            seq.finish_time = time.perf_counter()
        positions = [position for position, seq in enumerate(self.running) if seq.finish_reason is not None]
        if positions:
            self._release(np.array(positions, np.int64))
        if any(seq.finish_reason is not None for seq in self.waiting):
            self.waiting = deque(seq for seq in self.waiting if seq.finish_reason is None)

    def _release(self, positions: IntArray) -> None:
        """Take back blocks and rows of the running sequences at `positions`, which have a finish reason."""
        for position in positions.tolist():
            seq = self.running[position]
            seq.finish_time = time.perf_counter()
            self.block_manager.free(seq)
        self._free_rows.extend(self._rows[positions].tolist())
        self._rows = np.delete(self._rows, positions)
        self.running = [seq for seq in self.running if seq.finish_reason is None]
