"""Scheduler: what runs in which step, preemption, and the ends of sequences."""

import sys
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduled_batch import ScheduledBatch, StartedSequence
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

BLOCK_SIZE = 4
LENGTHS = (1, 3, 4, 5, 7, 8, 9, 12, 17)
EOS = (90, 91)


class WatchedScheduler(Scheduler):
    """A scheduler whose rows are checked before and after each step."""

    def reset(self) -> None:
        super().reset()
        self.seq_of: dict[int, int] = {}  # row -> id of the sequence that runs there, as the model runners know it
        self.check_rows()

    def schedule(self) -> ScheduledBatch:
        batch = super().schedule()
        running = {seq.seq_id for seq in self.running}
        self.seq_of = {row: seq_id for row, seq_id in self.seq_of.items() if seq_id in running}  # others were preempted
        for row, _ in batch.new_blocks:
            assert row in self.seq_of, "a block for a sequence that does not go on"
        for started in batch.started:
            assert started.row not in self.seq_of, "a row that another sequence has"
            self.seq_of[started.row] = started.seq_id
        self.check_rows()
        return batch

    def update(self, batch: ScheduledBatch, token_ids: NDArray[np.integer]) -> list[Sequence]:
        finished = super().update(batch, token_ids)
        ended = {seq.seq_id for seq in finished}
        self.seq_of = {row: seq_id for row, seq_id in self.seq_of.items() if seq_id not in ended}
        self.check_rows()
        return finished

    def check_rows(self) -> None:
        row_of = {seq_id: row for row, seq_id in self.seq_of.items()}
        counts = self.running.counts
        assert counts.row.tolist() == [row_of[seq.seq_id] for seq in self.running]
        assert len(row_of) == len(self.running)
        assert sorted([*row_of.values(), *self.running.free_rows]) == list(range(self.max_num_seqs))
        self.running.append_recent()
        assert counts.num_tokens.tolist() == [len(seq) for seq in self.running]
        assert ((counts.num_computed >= 0) & (counts.num_computed < counts.num_tokens)).all()
        assert counts.capacity.tolist() == [len(seq.block_table) * BLOCK_SIZE for seq in self.running]


@dataclass(frozen=True)
class Step:
    """One step, told in the ids of sequences where a batch has rows."""

    seq_ids: tuple[int, ...]
    num_tokens: tuple[int, ...]
    preempted: tuple[int, ...]  # newest first
    finished: tuple[int, ...]
    started: tuple[StartedSequence, ...]
    new_blocks: tuple[tuple[int, int], ...]
    num_prefill_tokens: int
    num_decode_tokens: int


def make_scheduler(
    num_blocks: int = 64, max_num_seqs: int = 16, budget: int = 64, prefix_caching: bool = True
) -> WatchedScheduler:
    manager = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=prefix_caching)
    return WatchedScheduler(manager, max_num_seqs, budget, eos_token_ids=EOS)


def make_seq(seq_id: int, token_ids: list[int], max_tokens: int = 3, ignore_eos: bool = False) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    return Sequence(seq_id, token_ids, params, seed=100 + seq_id, max_total_tokens=len(token_ids) + max_tokens)


def prompt(name: int, length: int) -> list[int]:
    """Tokens that no prompt of another name has."""
    return list(range(1000 * name, 1000 * name + length))


def add(scheduler: Scheduler, *lengths: int, max_tokens: int = 3) -> list[Sequence]:
    """Queue sequences 0, 1, ... of these lengths, with nothing in common."""
    seqs = [make_seq(seq_id, prompt(seq_id + 1, length), max_tokens) for seq_id, length in enumerate(lengths)]
    for seq in seqs:
        scheduler.add(seq)
    return seqs


def sampled(scheduler: Scheduler, batch: ScheduledBatch) -> NDArray[np.intp]:
    """The positions, in the batch and among those that run, of the sequences whose last token is in the batch."""
    counts, size = scheduler.running.counts, len(batch.rows)
    left = (counts.num_tokens - counts.num_computed)[:size]
    return np.flatnonzero(batch.num_tokens == left)


def complete(scheduler: Scheduler, batch: ScheduledBatch, token_id: int = 1) -> list[Sequence]:
    """The step's other half: as if the model had run."""
    return scheduler.update(batch, np.full(len(sampled(scheduler, batch)), token_id))


def step(scheduler: WatchedScheduler, token_id: int = 1) -> Step:
    before = [seq.seq_id for seq in scheduler.running]
    batch = scheduler.schedule()
    seq_of, running = dict(scheduler.seq_of), set(scheduler.seq_of.values())
    seq_ids = tuple(seq_of[row] for row in batch.rows.tolist())
    assert list(seq_ids) == [seq.seq_id for seq in scheduler.running][: len(seq_ids)]
    finished = complete(scheduler, batch, token_id)
    return Step(
        seq_ids=seq_ids,
        num_tokens=tuple(batch.num_tokens.tolist()),
        preempted=tuple(seq_id for seq_id in reversed(before) if seq_id not in running),
        finished=tuple(seq.seq_id for seq in finished),
        started=batch.started,
        new_blocks=tuple((seq_of[row], block_id) for row, block_id in batch.new_blocks),
        num_prefill_tokens=batch.num_prefill_tokens,
        num_decode_tokens=batch.num_decode_tokens,
    )


def run(scheduler: WatchedScheduler, token_id: int = 1) -> list[Step]:
    steps: list[Step] = []
    while not scheduler.is_finished():
        steps.append(step(scheduler, token_id))
        assert len(steps) < 10_000, "no end in sight"
    assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
    return steps


def chunks(steps: list[Step]) -> dict[int, list[int]]:
    """By sequence, the numbers of tokens that were computed in each step."""
    by_seq: defaultdict[int, list[int]] = defaultdict(list)
    for one in steps:
        for seq_id, num_tokens in zip(one.seq_ids, one.num_tokens, strict=True):
            by_seq[seq_id].append(num_tokens)
    return by_seq


def num_uncomputed_tokens(scheduler: WatchedScheduler) -> int:
    """What is left to compute of all tokens so far."""
    counts = scheduler.running.counts
    return int((counts.num_tokens - counts.num_computed).sum()) + sum(map(len, scheduler.waiting))


# ---- chunked prefill ----


@pytest.mark.parametrize("budget", range(1, 20))
def test_any_prompt_is_chunked_and_none_stalls(budget: int) -> None:
    scheduler = make_scheduler(budget=budget)
    seqs = add(scheduler, *LENGTHS)
    batches: list[Step] = []
    while not scheduler.is_finished():
        work = num_uncomputed_tokens(scheduler)
        batches.append(step(scheduler))
        assert sum(batches[-1].num_tokens) == min(budget, work)  # no budget is wasted while there is work
        assert min(batches[-1].num_tokens) >= 1
    for seq, length in zip(seqs, LENGTHS, strict=True):
        assert sum(chunks(batches)[seq.seq_id]) == length + 2  # the last of three sampled tokens is never computed
        assert seq.completion_token_ids == [1, 1, 1]
        assert seq.num_cached_tokens == 0


@pytest.mark.parametrize("budget", range(1, 20))
@pytest.mark.parametrize("length", LENGTHS)
def test_after_a_hit_the_rest_is_chunked_without_an_empty_chunk(length: int, budget: int) -> None:
    scheduler = make_scheduler(budget=budget)
    scheduler.add(make_seq(0, prompt(1, length), max_tokens=1))
    run(scheduler)
    seq = make_seq(1, prompt(1, length), max_tokens=1)
    scheduler.add(seq)
    hit = (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    rest = length - hit
    sizes = chunks(run(scheduler))[1]
    assert sizes == [budget] * (rest // budget) + [rest % budget] * (rest % budget > 0)
    assert seq.num_cached_tokens == hit


def test_a_chunk_ends_where_the_budget_does_and_decodes_go_first() -> None:
    scheduler = make_scheduler(budget=6)
    add(scheduler, 4, 9)
    assert step(scheduler).num_tokens == (4, 2)
    assert step(scheduler).num_tokens == (1, 5)
    assert step(scheduler).num_tokens == (1, 2)
    assert step(scheduler).num_tokens == (1,)


def test_a_sequence_samples_only_after_its_last_chunk() -> None:
    scheduler = make_scheduler(budget=4)
    (seq,) = add(scheduler, 9)
    lengths: list[int] = []
    while not scheduler.is_finished():
        step(scheduler)
        lengths.append(len(seq))
    assert lengths == [9, 9, 10, 11, 12]


def test_prefill_and_decode_tokens_are_counted_apart() -> None:
    scheduler = make_scheduler(budget=6)
    add(scheduler, 4, 9)
    counts = [(batch.num_prefill_tokens, batch.num_decode_tokens) for batch in run(scheduler)]
    assert counts == [(6, 0), (5, 1), (2, 1), (0, 1), (0, 1)]


# ---- order and limits ----


def test_the_batch_is_in_order_of_arrival() -> None:
    scheduler = make_scheduler(budget=7)
    add(scheduler, *LENGTHS)
    for batch in run(scheduler):
        assert list(batch.seq_ids) == sorted(batch.seq_ids)


def test_no_more_than_max_num_seqs_run_and_the_oldest_come_first() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, 3, 3, 3, 3, 3)
    assert [batch.seq_ids for batch in run(scheduler)] == [(0, 1)] * 3 + [(2, 3)] * 3 + [(4,)] * 3


def test_a_sequence_that_does_not_fit_holds_back_newer_ones() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, 5, 9, 1)  # 2, 3 and 1 blocks
    assert step(scheduler).seq_ids == (0,)
    run(scheduler)


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_no_more_run_than_the_budget_serves(budget: int) -> None:
    scheduler = make_scheduler(budget=budget)
    seqs = add(scheduler, *[1] * 8, max_tokens=6)
    for batch in run(scheduler):
        assert len(batch.seq_ids) <= budget
    assert all(len(seq) == 7 for seq in seqs)


def test_a_budget_below_the_number_of_running_sequences_serves_the_oldest() -> None:
    scheduler = make_scheduler(budget=8)
    add(scheduler, 1, 1, 1, 1, 1, max_tokens=4)
    step(scheduler)
    scheduler.max_num_batched_tokens = 2
    served = [batch.seq_ids for batch in run(scheduler)]
    assert served == [(0, 1)] * 3 + [(2, 3)] * 3 + [(4,)] * 3


def test_an_older_prefill_may_take_the_budget_of_newer_decodes_for_a_while() -> None:
    scheduler = make_scheduler(budget=12)
    shared = prompt(1, 8)
    for seq_id, token_ids in enumerate([shared + prompt(2, 1), shared + prompt(3, 31), prompt(4, 2)]):
        scheduler.add(make_seq(seq_id, token_ids, max_tokens=5))
    served = [(batch.seq_ids, batch.num_tokens) for batch in run(scheduler)]
    assert served[:5] == [
        ((0, 2), (9, 2)),  # 1 waits for the blocks that it shares with 0
        ((0, 1), (1, 11)),
        ((0, 1), (1, 11)),
        ((0, 1, 2), (1, 9, 1)),
        ((0, 1, 2), (1, 1, 1)),
    ]


# ---- sharing what is being computed ----


@pytest.mark.parametrize("length", [8, 9, 12, 13])
def test_the_first_of_equal_prompts_computes_and_the_others_share_in_the_next_step(length: int) -> None:
    scheduler = make_scheduler()
    seqs = [make_seq(seq_id, prompt(1, length)) for seq_id in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    hit = (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    first, second = step(scheduler), step(scheduler)
    assert (first.seq_ids, first.num_tokens) == ((0,), (length,))
    assert (second.seq_ids, second.num_tokens) == ((0, 1, 2, 3), (1, *[length - hit] * 3))
    assert [seq.num_cached_tokens for seq in seqs] == [0, hit, hit, hit]
    shared = {tuple(seq.block_table[: hit // BLOCK_SIZE]) for seq in seqs}
    assert len(shared) == 1
    run(scheduler)


@pytest.mark.parametrize("length", [1, 3, 4])
def test_equal_prompts_without_a_block_to_share_do_not_wait(length: int) -> None:
    scheduler = make_scheduler()
    for seq_id in range(3):
        scheduler.add(make_seq(seq_id, prompt(1, length)))
    assert step(scheduler).num_tokens == (length,) * 3
    run(scheduler)


def test_a_prompt_waits_only_for_the_blocks_that_it_shares() -> None:
    scheduler = make_scheduler(budget=4)
    first, second = make_seq(0, prompt(1, 16)), make_seq(1, prompt(1, 4) + prompt(2, 3))
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler).seq_ids == (0,)
    scheduler.max_num_batched_tokens = 8
    assert step(scheduler).seq_ids == (0,)  # the older one takes all of the budget, up to its last chunk
    batch = step(scheduler)
    assert (batch.seq_ids, batch.num_tokens) == ((0, 1), (4, 3))
    assert second.num_cached_tokens == 4
    run(scheduler)


def test_without_prefix_caching_equal_prompts_run_at_once() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    seqs = [make_seq(seq_id, prompt(1, 9)) for seq_id in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    assert step(scheduler).num_tokens == (9, 9, 9)
    assert [seq.num_cached_tokens for seq in seqs] == [0, 0, 0]
    run(scheduler)


def test_order_of_arrival_holds_after_passing_over() -> None:
    scheduler = make_scheduler()
    for seq_id, name in enumerate([1, 1, 2, 1, 2, 3]):
        scheduler.add(make_seq(seq_id, prompt(name, 9)))
    assert step(scheduler).seq_ids == (0, 2, 5)
    assert [seq.seq_id for seq in scheduler.waiting] == [1, 3, 4]
    batch = step(scheduler)
    assert batch.seq_ids == (0, 1, 2, 3, 4, 5)
    assert batch.num_tokens == (1, 1, 1, 1, 1, 1)
    assert [started.seq_id for started in batch.started] == [1, 3, 4]
    assert [seq.seq_id for seq in scheduler.running] == [0, 1, 2, 3, 4, 5]
    run(scheduler)


def test_those_passed_over_count_towards_max_num_seqs() -> None:
    """So that one step looks at no more waiting sequences than can run."""
    scheduler = make_scheduler(max_num_seqs=3)
    for seq_id in range(5):
        scheduler.add(make_seq(seq_id, prompt(1, 9)))
    scheduler.add(make_seq(5, prompt(2, 9)))
    assert step(scheduler).seq_ids == (0,)
    assert step(scheduler).seq_ids == (0, 1, 2)
    run(scheduler)


def test_one_that_waited_for_a_preempted_sequence_waits_no_longer_for_its_blocks() -> None:
    scheduler = make_scheduler(num_blocks=6, budget=6)
    seqs = [make_seq(0, prompt(1, 4)), make_seq(1, prompt(2, 20)), make_seq(2, prompt(2, 20))]
    for seq in seqs:
        scheduler.add(seq)
    assert step(scheduler).num_tokens == (4, 2)
    assert scheduler.block_manager.find_prefix(seqs[2]) == []
    assert scheduler.block_manager.is_next_block_being_computed(seqs[2], 0)
    assert step(scheduler).preempted == (1,)
    assert not scheduler.block_manager.is_next_block_being_computed(seqs[2], 0)
    run(scheduler)
    assert [seq.completion_token_ids for seq in seqs] == [[1, 1, 1]] * 3


# ---- preemption ----


def crowd(scheduler: WatchedScheduler, max_tokens: int = 8) -> tuple[Sequence, Sequence]:
    """Two sequences that fill four blocks with their prompts and must grow."""
    first, second = add(scheduler, 7, 7, max_tokens=max_tokens)
    step(scheduler)
    step(scheduler)
    assert scheduler.block_manager.num_free_blocks == 0
    assert len(first) == len(second) == 9
    return first, second


def test_the_newest_is_preempted_and_starts_again_from_all_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=4)
    _, second = crowd(scheduler)
    batch = step(scheduler)
    assert (batch.preempted, batch.seq_ids, scheduler.num_preemptions) == ((1,), (0,), 1)
    assert (second.block_table, second.num_published_blocks, list(scheduler.waiting)) == ([], 0, [second])
    assert second.completion_token_ids == [1, 1]
    later = run(scheduler)
    (started,) = [started for batch in later for started in batch.started]
    assert started.seq_id == 1
    assert started.token_ids.tolist() == [*prompt(2, 7), 1, 1]
    assert started.num_prompt_tokens == 7
    assert second.completion_token_ids == [1] * 8
    assert second.num_cached_tokens == 0  # of its first admission


def test_a_preempted_sequence_hits_its_own_blocks() -> None:
    scheduler = make_scheduler(num_blocks=5)
    first = make_seq(0, prompt(1, 7), max_tokens=3)
    second = make_seq(1, prompt(2, 11), max_tokens=4)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    step(scheduler)
    batch = step(scheduler)
    assert (batch.preempted, batch.finished) == ((1,), (0,))  # the third token of the first took a block
    batch = step(scheduler)
    (started,) = batch.started
    assert len(started.token_ids) == 13
    assert started.num_computed_tokens == 8  # its third block was its tail: reused first
    assert batch.num_tokens == (5,)
    run(scheduler)
    assert second.num_cached_tokens == 0  # what its first admission found: its own blocks are no hit on a prompt


def test_nothing_is_admitted_in_a_step_that_preempted() -> None:
    scheduler = make_scheduler(num_blocks=9)
    scheduler.add(make_seq(0, prompt(1, 4)))
    scheduler.add(make_seq(1, prompt(2, 17)))
    scheduler.add(make_seq(2, prompt(2, 4) + prompt(3, 1)))  # waits for the first block of 1
    scheduler.add(make_seq(3, prompt(4, 9)))
    assert step(scheduler).seq_ids == (0, 1, 3)
    batch = step(scheduler)
    assert (batch.preempted, batch.seq_ids, batch.started) == ((3,), (0, 1), ())
    hits = scheduler.block_manager.find_prefix(scheduler.waiting[0])
    assert scheduler.block_manager.can_allocate(scheduler.waiting[0], hits)  # it was not for want of blocks
    assert [started.seq_id for started in step(scheduler).started] == [2]
    run(scheduler)


def test_several_are_preempted_newest_first_and_wait_in_order_of_arrival() -> None:
    scheduler = make_scheduler(num_blocks=6, prefix_caching=False)
    seqs = add(scheduler, 4, 4, 4, 4, 4, 4, max_tokens=12)
    step(scheduler)
    batch = step(scheduler)  # each needs a second block: three take it, three give theirs
    assert batch.preempted == (5, 4, 3)
    assert batch.seq_ids == (0, 1, 2)
    assert [seq.seq_id for seq in scheduler.waiting] == [3, 4, 5]
    batches = run(scheduler)
    assert scheduler.num_preemptions > 3
    assert all(seq.completion_token_ids == [1] * 12 for seq in seqs)
    for batch in batches:
        assert list(batch.seq_ids) == sorted(batch.seq_ids)


def test_the_newest_may_preempt_itself() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, 9, 3, max_tokens=4)
    step(scheduler)
    step(scheduler)
    batch = step(scheduler)  # the first has room to its end, the second needs a block
    assert (batch.preempted, batch.seq_ids, batch.new_blocks) == ((1,), (0,), ())
    run(scheduler)


def test_a_preempted_sequence_waits_behind_an_older_one_that_was_passed_over() -> None:
    scheduler = make_scheduler(num_blocks=8, budget=6)
    scheduler.add(make_seq(0, prompt(1, 4), max_tokens=14))
    scheduler.add(make_seq(1, prompt(2, 17)))
    scheduler.add(make_seq(2, prompt(2, 17)))
    scheduler.add(make_seq(3, prompt(3, 1), max_tokens=9))
    while not scheduler.num_preemptions:
        step(scheduler)
        assert [seq.seq_id for seq in scheduler.waiting] == sorted(seq.seq_id for seq in scheduler.waiting)
    for batch in run(scheduler):
        assert list(batch.seq_ids) == sorted(batch.seq_ids)
        assert [seq.seq_id for seq in scheduler.waiting] == sorted(seq.seq_id for seq in scheduler.waiting)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("budget", [1, 2, 5, 64])
@pytest.mark.parametrize("num_blocks", [5, 6, 7, 9])
def test_preemption_changes_no_output(num_blocks: int, budget: int, prefix_caching: bool) -> None:
    def outputs(scheduler: WatchedScheduler) -> list[list[int]]:
        seqs = add(scheduler, *LENGTHS, max_tokens=4)
        while not scheduler.is_finished():
            batch = scheduler.schedule()
            last = [scheduler.running[position] for position in sampled(scheduler, batch)]
            scheduler.update(batch, np.array([sum(seq.token_ids) % 50 for seq in last], np.int64))
        return [seq.token_ids for seq in seqs]

    crowded = make_scheduler(num_blocks, budget=budget, prefix_caching=prefix_caching)
    assert outputs(crowded) == outputs(make_scheduler())


def test_one_sequence_may_fill_the_whole_cache() -> None:
    scheduler = make_scheduler(num_blocks=3)
    seq = make_seq(0, prompt(1, 5), max_tokens=8)
    assert scheduler.block_manager.num_blocks_for(seq.max_total_tokens - 1) == 3
    scheduler.add(seq)
    run(scheduler)
    assert (len(seq), scheduler.num_preemptions) == (13, 0)  # 12 places, and the last token needs none


def test_a_request_that_cannot_fit_is_an_assertion_not_an_endless_loop() -> None:
    scheduler = make_scheduler(num_blocks=2)
    add(scheduler, 9)
    with pytest.raises(AssertionError, match="nothing can run"):
        scheduler.schedule()


# ---- the ends ----


@pytest.mark.parametrize("eos", EOS)
def test_each_end_of_sequence_token_ends_a_sequence(eos: int) -> None:
    scheduler = make_scheduler()
    (seq,) = add(scheduler, 3, max_tokens=8)
    step(scheduler)
    batch = scheduler.schedule()
    assert complete(scheduler, batch, eos) == [seq]
    assert (seq.finish_reason, seq.completion_token_ids) == ("stop", [1, eos])
    assert scheduler.is_finished()


def test_end_of_sequence_in_the_prompt_ends_nothing() -> None:
    scheduler = make_scheduler()
    seq = make_seq(0, [90, 91, 90], max_tokens=2)
    scheduler.add(seq)
    run(scheduler)
    assert seq.finish_reason == "length"


@pytest.mark.parametrize(("ignore_eos", "length", "reason"), [(False, 1, "stop"), (True, 5, "length")])
def test_ignore_eos_goes_on_to_max_tokens(ignore_eos: bool, length: int, reason: str) -> None:
    scheduler = make_scheduler()
    seq = make_seq(0, [1, 2], max_tokens=5, ignore_eos=ignore_eos)
    scheduler.add(seq)
    run(scheduler, token_id=91)
    assert (seq.completion_token_ids, seq.finish_reason) == ([91] * length, reason)


def test_end_of_sequence_as_the_last_token_is_a_stop() -> None:
    scheduler = make_scheduler()
    (seq,) = add(scheduler, 2, max_tokens=1)
    run(scheduler, token_id=90)
    assert seq.finish_reason == "stop"


@pytest.mark.parametrize("max_total_tokens", [7, 8, 9, 10])
def test_a_sequence_is_cut_where_prompt_and_output_reach_the_limit(max_total_tokens: int) -> None:
    scheduler = make_scheduler()
    params = SamplingParams(max_tokens=100)
    seq = Sequence(0, prompt(1, 6), params, seed=0, max_total_tokens=max_total_tokens)
    scheduler.add(seq)
    run(scheduler)
    assert (len(seq), seq.finish_reason) == (max_total_tokens, "length")


def test_update_returns_the_finished_and_frees_their_blocks() -> None:
    scheduler = make_scheduler()
    short, long, last = (make_seq(i, prompt(i + 1, 5), max_tokens) for i, max_tokens in enumerate([2, 3, 2]))
    for seq in (short, long, last):
        scheduler.add(seq)
    assert complete(scheduler, scheduler.schedule()) == []
    assert complete(scheduler, scheduler.schedule()) == [short, last]
    assert (short.block_table, last.block_table, list(scheduler.running)) == ([], [], [long])
    assert scheduler.block_manager.num_free_blocks == 64 - 2


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_wrong_number_of_sampled_tokens_is_an_error(num_tokens: int) -> None:
    scheduler = make_scheduler()
    add(scheduler, 3)
    with pytest.raises(AssertionError, match="sampled"):
        scheduler.update(scheduler.schedule(), np.ones(num_tokens, np.int64))


# ---- what the runners are told ----


def test_a_batch_is_frozen() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3)
    batch = scheduler.schedule()
    with pytest.raises(AttributeError):
        batch.num_prefill_tokens = 1  # type: ignore[misc]
    with pytest.raises(AttributeError):
        batch.started[0].seed = 1  # type: ignore[misc]


def test_a_sequence_that_starts_comes_whole() -> None:
    scheduler = make_scheduler(budget=4)
    scheduler.add(make_seq(0, prompt(1, 9), max_tokens=1))
    run(scheduler)
    seq = make_seq(1, prompt(1, 9))
    scheduler.add(seq)
    (started,) = scheduler.schedule().started
    assert started == StartedSequence(
        row=started.row,
        seq_id=1,
        token_ids=array("i", prompt(1, 9)),
        num_prompt_tokens=9,
        num_computed_tokens=8,
        block_table=tuple(seq.block_table),
        sampling_params=seq.sampling_params,
        seed=101,
    )


def test_a_sequence_that_goes_on_comes_with_its_new_blocks_only() -> None:
    scheduler = make_scheduler()
    first, second = add(scheduler, 4, 6, max_tokens=8)
    assert step(scheduler).new_blocks == ()
    batches: list[Step] = []
    blocks: list[list[int]] = []
    for _ in range(5):
        batches.append(step(scheduler))
        blocks.append([first.block_table[-1], second.block_table[-1]])
    assert [batch.started for batch in batches] == [()] * 5
    assert batches[0].new_blocks == ((0, blocks[0][0]),)  # the first's fifth token
    assert batches[1].new_blocks == ()
    assert batches[2].new_blocks == ((1, blocks[2][1]),)
    assert batches[3].new_blocks == ()
    assert batches[4].new_blocks == ((0, blocks[4][0]),)


def test_a_batch_is_arrays_of_equal_length() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3, 9)
    batch = scheduler.schedule()
    for values in (batch.rows, batch.num_tokens):
        assert (values.shape, values.dtype) == ((2,), np.int64)


def test_a_batch_is_not_changed_by_later_steps() -> None:
    """A model runner in another process may be late."""
    scheduler = make_scheduler(num_blocks=6)
    add(scheduler, 4, 4, 4, 4, 4, 4, max_tokens=12)
    batches: list[tuple[ScheduledBatch, list[int], list[int]]] = []
    while not scheduler.is_finished():
        batch = scheduler.schedule()
        batches.append((batch, batch.rows.tolist(), batch.num_tokens.tolist()))
        complete(scheduler, batch)
    assert all((batch.rows.tolist(), batch.num_tokens.tolist()) == (rows, num) for batch, rows, num in batches)


def test_the_rows_of_those_that_ended_are_given_again() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for seq_id, max_tokens in enumerate([1, 2, 2, 5, 1, 1, 3]):
        scheduler.add(make_seq(seq_id, prompt(seq_id + 1, 3), max_tokens))
    steps = run(scheduler)
    assert [one.finished for one in steps] == [(0,), (1,), (2,), (4,), (5,), (), (3,), (6,)]
    rows = [started.row for one in steps for started in one.started]
    assert len(rows) == 7
    assert set(rows) == {0, 1}


def test_the_rows_of_those_that_were_preempted_are_given_again() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_seqs=6)
    seqs = add(scheduler, 4, 4, 4, 4, 4, 4, max_tokens=12)
    steps = run(scheduler)
    assert {started.row for started in steps[0].started} == set(range(6))
    assert sum(len(one.preempted) for one in steps) == scheduler.num_preemptions > 3
    assert sum(len(one.started) for one in steps) == 6 + scheduler.num_preemptions
    assert all(seq.completion_token_ids == [1] * 12 for seq in seqs)


# ---- reset ----


def leave_waiting(scheduler: WatchedScheduler) -> None:
    add(scheduler, 3, 9)


def leave_scheduled(scheduler: WatchedScheduler) -> None:
    add(scheduler, 3, 9)
    scheduler.schedule()


def leave_chunked(scheduler: WatchedScheduler) -> None:
    add(scheduler, 3, 9, 9)
    step(scheduler)


def leave_ended(scheduler: WatchedScheduler) -> None:
    add(scheduler, 3, max_tokens=1)
    step(scheduler)


def leave_half_updated(scheduler: WatchedScheduler) -> None:
    add(scheduler, 3, 3, max_tokens=1)
    with pytest.raises(AssertionError, match="sampled"):
        scheduler.update(scheduler.schedule(), np.ones(1, np.int64))


def leave_preempted(scheduler: WatchedScheduler) -> None:
    add(scheduler, 3, 3, max_tokens=30)
    while not scheduler.num_preemptions:
        step(scheduler)


@pytest.mark.parametrize(
    "leave", [leave_waiting, leave_scheduled, leave_chunked, leave_ended, leave_half_updated, leave_preempted]
)
def test_reset_drops_everything(leave: Callable[[WatchedScheduler], None]) -> None:
    scheduler = make_scheduler(num_blocks=9, max_num_seqs=3, budget=6)
    leave(scheduler)
    scheduler.reset()
    assert scheduler.is_finished()
    assert sorted(scheduler.running.free_rows) == [0, 1, 2]
    assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
    seq = make_seq(7, prompt(1, 9))
    scheduler.add(seq)
    batch = step(scheduler)
    assert (batch.preempted, batch.seq_ids, batch.num_tokens) == ((), (7,), (6,))
    run(scheduler)
    assert (seq.completion_token_ids, seq.num_cached_tokens) == ([1, 1, 1], 0)


# ---- cost ----


def count_calls(function: Callable[[], Any]) -> int:
    """Calls, of Python and of C functions, that `function` makes."""
    num_calls = 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(previous)
    return num_calls


def count_lines(function: Callable[[], Any]) -> int:
    """Lines of Python that `function` executes: sees loops that call nothing, but takes longer."""
    num_lines = 0

    def count(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal num_lines
        num_lines += event == "line"
        return count

    previous = sys.gettrace()
    sys.settrace(count)
    try:
        function()
    finally:
        sys.settrace(previous)
    return num_lines


def serve(num_requests: int, token_ids: Callable[[int], list[int]], max_tokens: int, **options: Any) -> Callable[[], None]:
    """All of `num_requests` requests, from arrival to end."""
    watched = make_scheduler(**options)  # whose own work is not to be counted
    scheduler = Scheduler(watched.block_manager, watched.max_num_seqs, watched.max_num_batched_tokens, EOS)
    seqs = [make_seq(seq_id, token_ids(seq_id), max_tokens) for seq_id in range(num_requests)]

    def all_requests() -> None:
        for seq in seqs:
            scheduler.add(seq)
        while not scheduler.is_finished():
            complete(scheduler, scheduler.schedule())

    return all_requests


@pytest.mark.parametrize("token_ids", [lambda seq_id: [seq_id], lambda seq_id: [7]], ids=["different", "equal"])
def test_one_token_requests_cost_the_same_however_many(token_ids: Callable[[int], list[int]]) -> None:
    options = {"num_blocks": 1000, "max_num_seqs": 512, "budget": 2048}
    few = count_calls(serve(5_120, token_ids, max_tokens=1, **options))
    many = count_calls(serve(51_200, token_ids, max_tokens=1, **options))
    assert 9.8 < many / few < 10.2


# All prompts equal: each waits for the first. In a small cache with long outputs: many preemptions.
@pytest.mark.parametrize(
    ("token_ids", "max_tokens", "options"),
    [
        (lambda seq_id: [seq_id], 1, {}),
        (lambda seq_id: list(range(9)), 2, {}),
        (lambda seq_id: prompt(seq_id, 9), 6, {"num_blocks": 20}),
    ],
    ids=["one token", "equal prompts", "preemptions"],
)
def test_any_requests_cost_the_same_however_many(
    token_ids: Callable[[int], list[int]], max_tokens: int, options: dict[str, int]
) -> None:
    few = count_lines(serve(100, token_ids, max_tokens, **options))
    many = count_lines(serve(1_000, token_ids, max_tokens, **options))
    assert 9 < many / few < 11
