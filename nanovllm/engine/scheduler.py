"""Scheduler: what runs in the next step, and what came of the last.

Each step is one batch: every running sequence goes on, oldest first (one token in decode, a chunk in prefill), then
waiting sequences are admitted in order of arrival while the token budget, the number of sequences and the free KV blocks
allow. A sequence is admitted with blocks for all its tokens, so only decoding can run out of blocks; then the newest
running sequence is preempted: it gives its blocks back, waits again, and later starts from its tokens so far.

The oldest sequence is never preempted for another, and every request is known to fit alone: so some always finishes.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class StartedSequence:
    """A sequence that joins the running ones: all that a model runner needs to know of it."""

    seq_id: int
    token_ids: tuple[int, ...]  # prompt and, after a preemption, output so far
    num_prompt_tokens: int
    num_computed_tokens: int  # found in the prefix cache
    block_table: tuple[int, ...]
    sampling_params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step, as increments to what the model runners know already. To be applied in this order."""

    released: tuple[int, ...]  # ids of sequences that ended or were preempted since the last batch
    started: tuple[StartedSequence, ...]
    new_blocks: tuple[tuple[int, int], ...]  # (id of a sequence that goes on, block appended to its table)
    seq_ids: tuple[int, ...]  # the batch, in order of arrival
    num_tokens: tuple[int, ...]  # tokens to compute of each
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
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: deque[Sequence] = deque()  # both queues are in order of arrival
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._released: list[int] = []  # what the next batch has to tell the runners
        self._scheduled: list[Sequence] = []  # the last batch

    def is_finished(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. The caller has checked that it can run: see `num_blocks_to_finish`."""
        self.waiting.append(seq)

    def num_blocks_to_finish(self, seq: Sequence) -> int:
        """KV blocks that `seq` needs to reach its end; its very last token is never computed."""
        return self.block_manager.num_blocks_for(seq.max_total_tokens - 1)

    def reset(self) -> None:
        """Drop every request and free every block, after an exception at any point of a step.

        The runners must be told to forget their sequences too.
        """
        self.waiting.clear()
        self.running.clear()
        self._released.clear()
        self._scheduled.clear()
        self.block_manager.reset()

    # ---- before a step ----

    def schedule(self) -> ScheduledBatch:
        """Choose the next batch. At least one sequence must be waiting or running."""
        chosen: list[tuple[Sequence, int]] = []
        new_blocks: list[tuple[int, int]] = []
        budget = self.max_num_batched_tokens
        num_running = len(self.running)
        for seq in self.running:
            if budget == 0 or not self._make_room(seq, new_blocks):
                break
            num_tokens = min(seq.num_uncomputed_tokens, budget)
            chosen.append((seq, num_tokens))
            budget -= num_tokens
        # A sequence that was just preempted would fit again at once, only to be preempted again.
        started = self._admit(budget) if len(self.running) == num_running else []
        for seq in started:
            num_tokens = min(seq.num_uncomputed_tokens, budget)
            chosen.append((seq, num_tokens))
            budget -= num_tokens
        assert chosen, "nothing can run: a request was added that the KV cache cannot hold"
        return self._make_batch(chosen, started, new_blocks)

    def _make_room(self, seq: Sequence, new_blocks: list[tuple[int, int]]) -> bool:
        """Give `seq` a block if it needs one, preempting newer sequences; False if it was itself the newest."""
        if not self.block_manager.is_full(seq):
            return True
        while self.block_manager.num_free_blocks == 0:
            newest = self.running.pop()
            self._preempt(newest)
            if newest is seq:
                return False
        block_id = self.block_manager.extend(seq)
        if block_id is not None:
            new_blocks.append((seq.seq_id, block_id))
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        self._released.append(seq.seq_id)
        self.num_preemptions += 1
        # Nearly always the front: only sequences that were passed over in `_admit` can be older.
        position = 0
        while position < len(self.waiting) and self.waiting[position].seq_id < seq.seq_id:
            position += 1
        self.waiting.insert(position, seq)

    def _admit(self, budget: int) -> list[Sequence]:
        """Move waiting sequences to the running ones while there is room; they have their blocks then.

        One whose next block is being computed for another sequence is passed over: in a later step it will share it.
        """
        started: list[Sequence] = []
        passed_over: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) + len(passed_over) < self.max_num_seqs:
            seq = self.waiting[0]
            hits = self.block_manager.find_prefix(seq)
            if self.block_manager.is_next_block_being_computed(seq, len(hits)):
                passed_over.append(self.waiting.popleft())
                continue
            if not self.block_manager.can_allocate(seq, hits):
                break
            self.block_manager.allocate(seq, hits)
            if seq.num_cached_tokens is None:
                seq.num_cached_tokens = seq.num_computed_tokens
            self.waiting.popleft()
            self.running.append(seq)
            started.append(seq)
            budget -= min(seq.num_uncomputed_tokens, budget)
        self.waiting.extendleft(reversed(passed_over))
        return started

    def _make_batch(
        self, chosen: list[tuple[Sequence, int]], started: list[Sequence], new_blocks: list[tuple[int, int]]
    ) -> ScheduledBatch:
        num_decode = sum(seq.is_decoding for seq, _ in chosen)
        if started:  # one that had been passed over may be older than some that run
            self.running.sort(key=lambda seq: seq.seq_id)
            chosen.sort(key=lambda item: item[0].seq_id)
        self._scheduled = [seq for seq, _ in chosen]
        released, self._released = tuple(self._released), []
        return ScheduledBatch(
            released=released,
            started=tuple(map(_start, started)),
            new_blocks=tuple(new_blocks),
            seq_ids=tuple(seq.seq_id for seq, _ in chosen),
            num_tokens=tuple(num_tokens for _, num_tokens in chosen),
            num_prefill_tokens=sum(num_tokens for _, num_tokens in chosen) - num_decode,
            num_decode_tokens=num_decode,
        )

    # ---- after a step ----

    def update(self, batch: ScheduledBatch, token_ids: list[int]) -> list[Sequence]:
        """Take in what a step computed.

        Args:
            batch: what `schedule` returned last.
            token_ids: one sampled token for each sequence of the batch whose last token was computed, in batch order.

        Returns:
            The sequences that finished, their blocks freed.
        """
        finished: list[Sequence] = []
        sampled = iter(token_ids)
        for seq, num_tokens in zip(self._scheduled, batch.num_tokens, strict=True):
            seq.num_computed_tokens += num_tokens
            self.block_manager.publish(seq)
            if seq.num_uncomputed_tokens == 0:
                self._append(seq, next(sampled))
                if seq.finish_reason is not None:
                    finished.append(seq)
        assert next(sampled, None) is None, "more tokens were sampled than sequences had their last token computed"
        for seq in finished:
            self.block_manager.free(seq)
            self._released.append(seq.seq_id)
        if finished:
            self.running = [seq for seq in self.running if seq.finish_reason is None]
        return finished

    def _append(self, seq: Sequence, token_id: int) -> None:
        seq.token_ids.append(token_id)
        if token_id in self.eos_token_ids and not seq.sampling_params.ignore_eos:
            seq.finish_reason = "stop"
        elif len(seq) >= seq.max_total_tokens:
            seq.finish_reason = "length"


def _start(seq: Sequence) -> StartedSequence:
    return StartedSequence(
        seq_id=seq.seq_id,
        token_ids=tuple(seq.token_ids),
        num_prompt_tokens=seq.num_prompt_tokens,
        num_computed_tokens=seq.num_computed_tokens,
        block_table=tuple(seq.block_table),
        sampling_params=seq.sampling_params,
        seed=seq.seed,
    )
