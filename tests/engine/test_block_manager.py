"""BlockManager: allocation, the prefix cache and the order in which free blocks are reused."""

from array import array
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as TokenIds

import pytest

from nanovllm.engine.block_manager import BlockManager, HashFunction, hash_block
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

BLOCK_SIZE = 4
COLLIDING: dict[str, HashFunction] = {
    "constant": lambda parent_hash, token_ids: 7,
    "two values": lambda parent_hash, token_ids: sum(token_ids) % 2,
    "without parent": lambda parent_hash, token_ids: hash(tuple(token_ids)),
    "root's": lambda parent_hash, token_ids: 0,  # the value that stands for "nothing before"
}


def make_manager(num_blocks: int = 8, hash_function: HashFunction = hash_block) -> BlockManager:
    return BlockManager(num_blocks, BLOCK_SIZE, hash_function=hash_function)


class TrackedSequence(Sequence):
    """A sequence that knows how far it is, in the place of a scheduler that knows it."""

    num_computed_tokens = 0


def make_seq(token_ids: list[int], seq_id: int = 0) -> TrackedSequence:
    return TrackedSequence(seq_id, token_ids, SamplingParams(), seed=0, max_total_tokens=1000)


def full(*names: int) -> list[int]:
    """The tokens of whole blocks, one block a name."""
    return [10 * name + offset for name in names for offset in range(BLOCK_SIZE)]


def admit(manager: BlockManager, token_ids: list[int]) -> TrackedSequence:
    """A new sequence, with its blocks."""
    seq = make_seq(token_ids)
    readmit(manager, seq)
    return seq


def readmit(manager: BlockManager, seq: TrackedSequence) -> None:
    hits = manager.find_prefix(seq)
    assert manager.can_allocate(seq, hits)
    seq.num_computed_tokens = manager.allocate(seq, hits)


def compute(manager: BlockManager, seq: TrackedSequence, num_tokens: int | None = None) -> None:
    """What a step does for `num_tokens` tokens of `seq`, default all that are left."""
    seq.num_computed_tokens += len(seq) - seq.num_computed_tokens if num_tokens is None else num_tokens
    manager.publish(seq, seq.num_computed_tokens)


def decode(manager: BlockManager, seq: TrackedSequence, token_id: int) -> None:
    seq.token_ids.append(token_id)
    if len(seq) > len(seq.block_table) * BLOCK_SIZE:
        manager.extend(seq)
    compute(manager, seq)


def run(manager: BlockManager, token_ids: list[int]) -> TrackedSequence:
    """Admit and compute; the sequence still holds its blocks."""
    seq = admit(manager, token_ids)
    compute(manager, seq)
    return seq


def remember(manager: BlockManager, token_ids: list[int]) -> list[int]:
    """Admit, compute and free. Returns the blocks it had."""
    seq = run(manager, token_ids)
    block_ids = list(seq.block_table)
    manager.free(seq)
    return block_ids


def num_hits(manager: BlockManager, token_ids: list[int]) -> int:
    """Blocks of `token_ids` that are found, with a token after them so that all of them may be."""
    return len(manager.find_prefix(make_seq([*token_ids, -1])))


def take_all_free(manager: BlockManager) -> list[int]:
    """The free blocks, in the order in which they are reused."""
    return [admit(manager, [1000 + index]).block_table[0] for index in range(manager.num_free_blocks)]


def check(manager: BlockManager, holders: list[Sequence]) -> None:
    """Every block is where its reference count says."""
    held = Counter(block_id for seq in holders for block_id in seq.block_table)
    assert [block.ref_count for block in manager.blocks] == [held[index] for index in range(manager.num_blocks)]
    assert manager.num_free_blocks + len(held) == manager.num_blocks


# ---- allocation ----


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for_tokens_are_rounded_up(num_tokens: int, num_blocks: int) -> None:
    assert make_manager().num_blocks_for(num_tokens) == num_blocks


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 31, 32])
def test_a_sequence_gets_blocks_for_all_its_tokens(num_tokens: int) -> None:
    manager = make_manager()
    seq = admit(manager, list(range(num_tokens)))
    assert len(set(seq.block_table)) == len(seq.block_table) == manager.num_blocks_for(num_tokens)
    assert seq.num_computed_tokens == 0
    check(manager, [seq])
    manager.free(seq)
    assert seq.block_table == []
    check(manager, [])


def test_can_allocate_up_to_the_last_block_and_no_further() -> None:
    manager = make_manager(num_blocks=3)
    admit(manager, [1])
    for num_tokens, fits in [(8, True), (9, False)]:
        seq = make_seq(list(range(num_tokens)))
        assert manager.can_allocate(seq, manager.find_prefix(seq)) == fits


def test_a_refused_sequence_leaves_the_manager_as_it_was() -> None:
    manager = make_manager(num_blocks=2)
    remember(manager, full(1, 2))
    seq = make_seq(full(1, 2, 3))
    assert not manager.can_allocate(seq, manager.find_prefix(seq))
    assert (seq.block_table, seq.num_published_blocks) == ([], 0)
    check(manager, [])
    assert num_hits(manager, full(1, 2)) == 2


def test_extend_adds_one_block_to_the_end() -> None:
    manager = make_manager(num_blocks=4)
    seq = run(manager, full(1))
    other = admit(manager, [1])
    for num_blocks in (2, 3):
        before = list(seq.block_table)
        added = manager.extend(seq)
        assert seq.block_table == [*before, added]
        assert len(seq.block_table) == num_blocks
        check(manager, [seq, other])
    assert manager.num_free_blocks == 0
    manager.free(other)
    assert manager.extend(seq) not in seq.block_table[:-1]
    check(manager, [seq])


def test_free_without_blocks_does_nothing() -> None:
    manager = make_manager()
    seq = run(manager, full(1))
    manager.free(seq)
    manager.free(seq)
    check(manager, [])


def test_what_only_a_bug_can_cause_is_an_assertion_with_a_message() -> None:
    manager = make_manager(num_blocks=1)
    seq = admit(manager, [1])
    with pytest.raises(AssertionError, match="already has blocks"):
        manager.allocate(seq, [])
    with pytest.raises(AssertionError, match="no free KV block"):
        manager.allocate(make_seq([1]), [])
    with pytest.raises(AssertionError, match="no free KV block"):
        manager.extend(seq)
    thief = make_seq([1])
    thief.block_table = list(seq.block_table)
    manager.free(seq)
    with pytest.raises(AssertionError, match="freed more often"):
        manager.free(thief)


# ---- hits ----


def test_a_prefix_is_shared_with_one_that_still_runs() -> None:
    manager = make_manager()
    first = run(manager, full(1, 2, 3))
    second = admit(manager, full(1, 2, 9))
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert second.num_computed_tokens == 2 * BLOCK_SIZE
    check(manager, [first, second])
    manager.free(first)
    check(manager, [second])
    assert num_hits(manager, full(1, 2)) == 2


def test_a_prefix_is_shared_with_one_that_is_gone() -> None:
    manager = make_manager()
    block_ids = remember(manager, full(1, 2, 3))
    seq = admit(manager, full(1, 2, 9))
    assert seq.block_table[:2] == block_ids[:2]
    assert manager.num_free_blocks == manager.num_blocks - 3
    check(manager, [seq])


def test_a_hit_ends_at_the_first_block_that_differs() -> None:
    manager = make_manager()
    remember(manager, full(1, 2, 3))
    assert num_hits(manager, full(1, 9, 3)) == 1
    assert num_hits(manager, full(9, 2, 3)) == 0
    assert num_hits(manager, full(1, 2, 3)) == 3


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_at_least_one_token_of_a_fully_cached_prompt_is_computed(num_blocks: int) -> None:
    manager = make_manager()
    prompt = full(*range(num_blocks))
    remember(manager, prompt)
    for num_tokens in range(1, len(prompt) + 1):
        seq = admit(manager, prompt[:num_tokens])
        assert seq.num_computed_tokens == (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert seq.num_computed_tokens < len(seq)
        manager.free(seq)
    assert num_hits(manager, prompt) == num_blocks


def test_the_recomputed_last_block_of_a_cached_prompt_is_a_block_of_its_own() -> None:
    manager = make_manager()
    first = run(manager, full(1, 2))
    second = run(manager, full(1, 2))
    assert second.block_table[0] == first.block_table[0]
    assert second.block_table[1] != first.block_table[1]  # written again, perhaps while the first reads its own
    check(manager, [first, second])


def test_hits_on_free_blocks_count_as_blocks_to_be_taken() -> None:
    manager = make_manager(num_blocks=3)
    other = admit(manager, [1])
    first = run(manager, full(1, 2))
    seq = make_seq(full(1, 2, 3))
    hits = manager.find_prefix(seq)
    assert len(hits) == 2
    assert not manager.can_allocate(seq, hits)  # no block at all is free
    manager.free(first)
    assert not manager.can_allocate(seq, hits)  # the two free ones are the hits themselves
    manager.free(other)
    assert manager.can_allocate(seq, hits)
    manager.allocate(seq, hits)
    assert manager.num_free_blocks == 0
    check(manager, [seq])


def test_hits_on_used_blocks_take_none() -> None:
    manager = make_manager(num_blocks=3)
    first = run(manager, full(1, 2))
    second = admit(manager, full(1, 2, 3))
    assert manager.num_free_blocks == 0
    check(manager, [first, second])


def test_a_preempted_sequence_finds_its_own_blocks_output_included() -> None:
    manager = make_manager()
    seq = run(manager, full(1)[:3])
    for token_id in range(7):
        decode(manager, seq, token_id)
    before = list(seq.block_table)
    manager.free(seq)
    assert (seq.block_table, seq.num_published_blocks) == ([], 0)
    readmit(manager, seq)
    assert len(seq) == 10
    assert seq.block_table[:2] == before[:2]
    assert seq.num_computed_tokens == 8
    compute(manager, seq)
    for token_id in range(7, 20):  # it goes on publishing where it stopped
        decode(manager, seq, token_id)
    assert num_hits(manager, seq.token_ids[:20]) == 5
    manager.free(seq)
    check(manager, [])


def test_a_sequence_preempted_in_its_prefill_finds_what_was_computed() -> None:
    manager = make_manager()
    seq = admit(manager, full(1, 2, 3))
    compute(manager, seq, 9)
    manager.free(seq)
    readmit(manager, seq)
    assert seq.num_computed_tokens == 8


def test_without_prefix_caching_nothing_is_found_waited_for_or_hashed() -> None:
    def no_hash(parent_hash: int, token_ids: TokenIds[int]) -> int:
        raise AssertionError("hashed without need")

    manager = BlockManager(8, BLOCK_SIZE, enable_prefix_caching=False, hash_function=no_hash)
    first = admit(manager, full(1, 2))
    second = make_seq(full(1, 2))
    assert manager.find_prefix(second) == []
    assert not manager.is_next_block_being_computed(second, 0)
    compute(manager, first)
    for token_id in range(5):
        decode(manager, first, token_id)
    readmit(manager, second)
    assert second.num_computed_tokens == 0
    assert not set(first.block_table) & set(second.block_table)
    check(manager, [first, second])
    manager.free(first)
    manager.free(second)
    check(manager, [])
    assert manager.find_prefix(make_seq(full(1, 2, 3))) == []


# ---- publishing ----


def test_only_full_computed_blocks_are_published() -> None:
    manager = make_manager()
    seq = admit(manager, full(1, 2, 3)[:11])
    found: list[int] = []
    for _ in range(len(seq)):
        found.append(num_hits(manager, full(1, 2, 3)))
        compute(manager, seq, 1)
    assert found == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert num_hits(manager, full(1, 2, 3)) == 2  # the third block lacks a token
    decode(manager, seq, full(3)[-1])
    assert num_hits(manager, full(1, 2, 3)) == 3


def test_the_last_sampled_token_is_not_published_before_it_is_computed() -> None:
    manager = make_manager()
    seq = run(manager, full(1)[:3])
    seq.token_ids.append(full(1)[3])
    assert num_hits(manager, full(1)) == 0
    manager.publish(seq, seq.num_computed_tokens)
    assert num_hits(manager, full(1)) == 0
    compute(manager, seq)
    assert num_hits(manager, full(1)) == 1


def test_a_block_is_being_computed_from_allocation_to_publication() -> None:
    manager = make_manager()
    first, second = admit(manager, full(1, 2, 3)), make_seq(full(1, 2, 9))
    for num_computed in range(12):
        hits = len(manager.find_prefix(second))
        assert hits == min(num_computed // BLOCK_SIZE, 2)
        # The third blocks differ, and a block with the last token is computed in any case: nothing to wait for.
        assert manager.is_next_block_being_computed(second, hits) == (num_computed < 8)
        compute(manager, first, 1)


def test_nothing_is_waited_for_once_the_one_who_computed_it_is_gone() -> None:
    manager = make_manager()
    first, second = admit(manager, full(1, 2, 3)), make_seq(full(1, 2, 9))
    compute(manager, first, 5)
    assert manager.is_next_block_being_computed(second, len(manager.find_prefix(second)))
    manager.free(first)
    hits = manager.find_prefix(second)
    assert len(hits) == 1
    assert not manager.is_next_block_being_computed(second, len(hits))


def test_the_first_of_two_who_compute_the_same_is_waited_for() -> None:
    manager = make_manager()
    first, second, third = admit(manager, full(1, 2)), admit(manager, full(1, 2)), make_seq(full(1, 2))
    manager.free(second)
    assert manager.find_prefix(third) == []
    assert manager.is_next_block_being_computed(third, 0)
    manager.free(first)
    assert not manager.is_next_block_being_computed(third, 0)


def test_a_prefix_computed_twice_is_found_once() -> None:
    manager = make_manager(num_blocks=6)
    first, second = admit(manager, full(1, 2)), admit(manager, full(1, 2, 3))  # neither waited for the other
    assert not set(first.block_table) & set(second.block_table)
    compute(manager, second)
    compute(manager, first)
    hits = manager.find_prefix(make_seq(full(1, 2, 3, 4)))
    assert [block.block_id for block in hits] == second.block_table
    duplicates = set(first.block_table)
    manager.free(second)
    manager.free(first)
    assert set(take_all_free(manager)[:3]) == {*duplicates, 5}  # the duplicates and the one never used are blank
    assert num_hits(manager, full(1, 2, 3)) == 0


def test_a_sequence_continues_the_prefix_that_another_published() -> None:
    manager = make_manager()
    first, second = admit(manager, full(1)), admit(manager, full(1, 2))
    compute(manager, first)
    compute(manager, second)  # its first block is a duplicate, its second is new
    assert num_hits(manager, full(1, 2)) == 2
    hits = manager.find_prefix(make_seq(full(1, 2, 3)))
    assert [block.block_id for block in hits] == [first.block_table[0], second.block_table[1]]


# ---- the order of reuse ----


def test_blank_blocks_are_reused_before_findable_ones() -> None:
    manager = make_manager(num_blocks=4)
    remember(manager, full(1, 2))
    unfinished = admit(manager, full(3))
    assert unfinished.block_table == [2]
    manager.free(unfinished)  # not computed: blank, although freed last
    assert take_all_free(manager) == [2, 3, 1, 0]


def test_findable_blocks_are_reused_least_recently_used_first() -> None:
    manager = make_manager(num_blocks=4)
    for name in (1, 2, 3):
        remember(manager, full(name))
    manager.free(admit(manager, [*full(1), 0]))  # a use of 1
    assert take_all_free(manager) == [3, 1, 2, 0]


def test_looking_is_no_use() -> None:
    manager = make_manager(num_blocks=3)
    for name in (1, 2, 3):
        remember(manager, full(name))
    assert num_hits(manager, full(1)) == 1
    assert take_all_free(manager) == [0, 1, 2]


def test_the_tail_of_a_freed_prefix_is_reused_before_its_head() -> None:
    manager = make_manager(num_blocks=4)
    remember(manager, full(1, 2, 3, 4))
    for left in (3, 2, 1, 0):
        admit(manager, [1000 + left])
        assert num_hits(manager, full(1, 2, 3, 4)) == left


def test_a_reused_block_is_no_longer_found() -> None:
    manager = make_manager(num_blocks=2)
    block_ids = remember(manager, full(1, 2))
    seq = admit(manager, full(7, 8))
    assert sorted(seq.block_table) == sorted(block_ids)
    for _ in range(len(seq)):  # neither before nor after the new contents are published
        assert num_hits(manager, full(1, 2)) == 0
        compute(manager, seq, 1)
    assert num_hits(manager, full(1, 2)) == 0
    assert num_hits(manager, full(7, 8)) == 2


def test_a_block_freed_by_one_of_two_is_not_reused() -> None:
    manager = make_manager(num_blocks=4)
    first = run(manager, full(1, 2))
    second = run(manager, [*full(1), 0])
    manager.free(first)
    assert set(take_all_free(manager)).isdisjoint(second.block_table)
    assert num_hits(manager, full(1)) == 1


def test_a_block_whose_parent_was_reused_and_computed_again_is_a_miss_and_then_a_hit() -> None:
    manager = make_manager(num_blocks=6)
    first, second = admit(manager, full(1)), admit(manager, full(1, 2))
    compute(manager, first)
    compute(manager, second)
    parent, child = first.block_table[0], second.block_table[1]
    manager.free(first)
    manager.free(second)  # frees the parent before the child: only a prefix computed twice can do that
    others: list[Sequence] = []
    while num_hits(manager, full(1)):
        others.append(admit(manager, [1000 + len(others)]))
    assert others[-1].block_table == [parent]
    assert manager.blocks[child].block_hash is not None
    for seq in others:
        manager.free(seq)
    remember(manager, full(1))
    assert num_hits(manager, full(1, 2)) == 1  # equal tokens, but not known to continue this parent
    again = run(manager, full(1, 2))
    assert again.block_table[1] != child
    assert num_hits(manager, full(1, 2)) == 2
    check_published_once(manager)


def check_published_once(manager: BlockManager) -> None:
    hashes = [block.block_hash for block in manager.blocks if block.block_hash is not None]
    assert len(hashes) == len(set(hashes))


# ---- hashes ----


def test_equal_tokens_after_different_parents_have_different_hashes() -> None:
    tokens = array("i", [1, 2, 3])
    assert hash_block(1, tokens) == hash_block(1, tokens[:])
    assert hash_block(1, tokens) != hash_block(2, tokens)
    assert hash_block(1, tokens) != hash_block(1, array("i", [1, 2, 4]))


@pytest.mark.parametrize("hash_function", [hash_block, *COLLIDING.values()], ids=["xxh64", *COLLIDING])
def test_a_block_is_found_after_its_own_parent_only(hash_function: HashFunction) -> None:
    manager = make_manager(hash_function=hash_function)
    remember(manager, full(1, 5))
    assert num_hits(manager, full(5)) == 0
    assert num_hits(manager, full(2, 5)) == 0
    remember(manager, full(2))
    assert num_hits(manager, full(2, 5)) <= 1  # both blocks may be known, but never together
    remember(manager, full(2, 5))
    assert num_hits(manager, full(1, 1)) <= 1
    assert num_hits(manager, full(5, 5)) == 0


@pytest.mark.parametrize("hash_function", COLLIDING.values(), ids=COLLIDING)
def test_colliding_hashes_never_give_a_wrong_hit(hash_function: HashFunction) -> None:
    manager = make_manager(num_blocks=5, hash_function=hash_function)
    held: dict[int, tuple[int, ...]] = {}  # block -> the whole prefix that was computed into it
    prompts = [full(a, b, c)[: 12 - cut] for a in (1, 2) for b in (1, 2) for c in (1, 3) for cut in (0, 1)]
    for prompt in prompts * 3:
        seq = admit(manager, prompt)
        for index, block_id in enumerate(seq.block_table):
            prefix = tuple(prompt[: (index + 1) * BLOCK_SIZE])
            if index * BLOCK_SIZE < seq.num_computed_tokens:
                assert held[block_id] == prefix
            held[block_id] = prefix
        compute(manager, seq)
        check(manager, [seq])
        manager.free(seq)
        check(manager, [])
        check_published_once(manager)


def test_a_collision_makes_room_for_the_newer_block() -> None:
    manager = make_manager(num_blocks=4, hash_function=COLLIDING["constant"])
    remember(manager, full(1))
    second = run(manager, full(2))
    assert (num_hits(manager, full(1)), num_hits(manager, full(2))) == (0, 1)
    third = run(manager, full(3))  # replaces one that is in use: the user keeps it, nobody else finds it
    assert (num_hits(manager, full(2)), num_hits(manager, full(3))) == (0, 1)
    check(manager, [second, third])
    (findable,) = third.block_table
    manager.free(third)
    manager.free(second)
    assert take_all_free(manager)[-1] == findable  # all others are blank
    check_published_once(manager)


def test_a_replaced_free_block_becomes_blank_and_is_reused_first() -> None:
    manager = make_manager(num_blocks=3, hash_function=lambda parent_hash, token_ids: token_ids[0] // 100)
    remember(manager, full(1))  # block 0, hash 0
    remember(manager, full(11))  # block 1, hash 1
    seq = run(manager, full(2))  # block 2, hash 0
    assert seq.block_table == [2]
    assert take_all_free(manager) == [0, 1]


def counting(calls: list[tuple[int, ...]]) -> HashFunction:
    def count(parent_hash: int, token_ids: TokenIds[int]) -> int:
        calls.append(tuple(token_ids))
        return hash_block(parent_hash, token_ids)

    return count


def preempt(manager: BlockManager, seq: TrackedSequence) -> None:
    manager.free(seq)
    readmit(manager, seq)
    compute(manager, seq)


def look(manager: BlockManager, seq: TrackedSequence) -> None:
    for _ in range(3):
        manager.can_allocate(seq, manager.find_prefix(seq))


@pytest.mark.parametrize("disturb", [look, preempt], ids=["admission attempts", "preemptions"])
def test_each_block_is_hashed_once_in_the_life_of_a_sequence(
    disturb: Callable[[BlockManager, TrackedSequence], None],
) -> None:
    calls: list[tuple[int, ...]] = []
    manager = make_manager(hash_function=counting(calls))
    seq = make_seq(full(1, 2, 3)[:11])
    look(manager, seq)
    assert len(calls) == 2
    readmit(manager, seq)
    compute(manager, seq, 5)
    compute(manager, seq)
    for token_id in range(14):
        decode(manager, seq, token_id)
        disturb(manager, seq)
    assert calls == [tuple(seq.token_ids[start : start + BLOCK_SIZE]) for start in range(0, len(seq) - 3, BLOCK_SIZE)]


# ---- reset ----


def abandon(manager: BlockManager) -> None:
    admit(manager, full(1, 2))


def half_compute(manager: BlockManager) -> None:
    compute(manager, admit(manager, full(1, 2, 3)), 6)


def lose_counts(manager: BlockManager) -> None:
    run(manager, full(1, 2))
    for block in manager.blocks:
        block.ref_count = -3


def lose_queues(manager: BlockManager) -> None:
    remember(manager, full(1, 2))
    manager._free.clear()
    manager._published.clear()


def cut_allocation(manager: BlockManager) -> None:
    """Ctrl-C between taking a block and noting it."""
    remember(manager, full(1, 2))
    manager._take_free_block()
    manager._free.popitem()


@pytest.mark.parametrize("breakage", [abandon, half_compute, lose_counts, lose_queues, cut_allocation])
def test_reset_frees_and_forgets_all_whatever_the_state(breakage: Callable[[BlockManager], None]) -> None:
    manager = make_manager(num_blocks=4)
    breakage(manager)
    manager.reset()
    check(manager, [])
    seq = make_seq(full(1, 2, 3))
    assert manager.find_prefix(seq) == []
    assert not manager.is_next_block_being_computed(seq, 0)
    assert remember(manager, full(1, 2, 3, 4)) == [0, 1, 2, 3]
    assert num_hits(manager, full(1, 2, 3, 4)) == 4
