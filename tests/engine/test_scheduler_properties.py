"""Scheduler, BlockManager and InputBatch together, over random lives, against a model that is only simulated.

The simulated model does to the KV cache what a real one does: it writes each scheduled token to its slot, and it reads the
context of each sequence through its block table. What it writes stands for K and V: as in a real model they depend on the
token and on all before it, as they are found in the cache, so what is written is the whole prefix. Each slot of a context
must then hold exactly the sequence's own prefix: a block that was hit before it was computed, or hit in spite of other
tokens or another parent, or overwritten by somebody else, shows at once.
"""

import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nanovllm.engine.block_manager import ROOT, BlockManager, HashFunction, hash_block
from nanovllm.engine.input_batch import InputBatch
from nanovllm.engine.scheduled_batch import ScheduledBatch
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_inputs import StepInputs
from nanovllm.layers.random_numbers import uniform
from nanovllm.sampling_params import SamplingParams

HASH_FUNCTIONS: dict[str, HashFunction] = {
    "xxh64": hash_block,
    "constant": lambda parent_hash, token_ids: 5,
    "three values": lambda parent_hash, token_ids: hash_block(parent_hash, token_ids) % 3,
    "without parent": lambda parent_hash, token_ids: hash_block(0, token_ids),
    "parent only": lambda parent_hash, token_ids: parent_hash + 1,
}
VOCAB_SIZE = 5
EOS = frozenset({0, 3})
# Prompts begin with one of these, so that they share prefixes; the first has equal blocks after different parents.
STREAMS = ([1] * 99, [1, 2] * 50, [2, 4, 1, 1, 2] * 20)

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """The sizes of an engine."""

    num_blocks: int
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int

    @property
    def max_model_len(self) -> int:
        """The longest sequence that fits alone: its last token needs no place in the cache."""
        return self.num_blocks * self.block_size + 1


@dataclass(frozen=True)
class Request:
    """Arrives."""

    prompt: Prefix
    max_tokens: int
    ignore_eos: bool
    seed: int


@dataclass(frozen=True)
class Steps:
    """Time passes."""

    number: int


@dataclass(frozen=True)
class Reset:
    """Everything is dropped, after an exception at this point of a step."""

    point: str


Action = Request | Steps | Reset
RESET_POINTS = ("between steps", "scheduled", "computed")


def make_script(random: Random) -> tuple[Setting, list[Action]]:
    """The sizes of an engine, its cache mostly too small for its requests, and what happens to it."""
    block_size = random.choice([1, 2, 3, 4, 8])
    setting = Setting(
        num_blocks=random.randint(2, max(4, 48 // block_size)),
        block_size=block_size,
        max_num_batched_tokens=random.choice([random.randint(1, 12), random.randint(8, 64)]),
        max_num_seqs=random.randint(1, 8),
    )
    actions: list[Action] = []
    for _ in range(random.randint(1, 6)):
        actions += [make_request(random, setting.max_model_len - 1) for _ in range(random.randint(1, 10))]
        actions.append(Steps(random.randint(1, 12)))
        if random.random() < 0.2:
            actions.append(Reset(random.choice(RESET_POINTS)))
    return setting, actions


def make_request(random: Random, longest: int) -> Request:
    shared = random.randint(1, random.choice([longest, 1 + longest // 3]))  # short ones can grow
    own = [random.randrange(VOCAB_SIZE) for _ in range(random.choice([0, 0, 1, 3]))]
    return Request(
        prompt=tuple((random.choice(STREAMS)[:shared] + own)[:longest]),
        max_tokens=random.choice([1, 3, random.randint(1, 30)]),
        ignore_eos=random.random() < 0.7,
        seed=random.randrange(4),
    )


def next_token(prefix: Prefix, number: float) -> int:
    """The model and the sampler: deterministic, and as different for different prefixes as can be."""
    return zlib.crc32(repr((prefix, number)).encode()) % VOCAB_SIZE


def undisturbed(request: Request, max_model_len: int) -> tuple[list[int], str]:
    """The tokens and the finish reason of a request, from the definition."""
    tokens = list(request.prompt)
    for index in range(request.max_tokens):
        number = uniform(np.array([request.seed], np.uint64), np.array([index], np.uint64))[0]
        tokens.append(next_token(tuple(tokens), float(number)))
        if tokens[-1] in EOS and not request.ignore_eos:
            return tokens, "stop"
        if len(tokens) == max_model_len:
            break
    return tokens, "length"


class Simulation:
    """An engine with a simulated model, checked at every step."""

    def __init__(self, setting: Setting, hash_function: HashFunction, prefix_caching: bool) -> None:
        self.setting = setting
        self.hash_function = hash_function
        self.manager = BlockManager(setting.num_blocks, setting.block_size, prefix_caching, hash_function)
        self.scheduler = Scheduler(self.manager, setting.max_num_seqs, setting.max_num_batched_tokens, EOS)
        self.input_batch = InputBatch(setting.max_num_seqs, setting.max_model_len, setting.block_size)
        self.kv_cache: dict[int, Prefix] = {}  # slot -> the prefix that ends with the token there
        self.unfinished: dict[int, tuple[Sequence, Request]] = {}
        self.row_of: dict[int, int] = {}  # sequence id -> row, of those that run
        self.next_seq_id = 0
        self.stats: Counter[str] = Counter()

    def run(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Request):
                self.add(action)
            elif isinstance(action, Reset):
                self.reset(action.point)
            else:
                for _ in range(action.number):
                    self.step()
        self.finish()

    def add(self, request: Request) -> None:
        max_total_tokens = min(len(request.prompt) + request.max_tokens, self.setting.max_model_len)
        params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=request.ignore_eos, seed=request.seed)
        seq = Sequence(self.next_seq_id, list(request.prompt), params, request.seed, max_total_tokens)
        assert self.manager.num_blocks_for(max_total_tokens - 1) <= self.setting.num_blocks
        self.next_seq_id += 1
        self.unfinished[seq.seq_id] = (seq, request)
        self.scheduler.add(seq)

    def reset(self, point: str) -> None:
        if point != "between steps" and not self.scheduler.is_finished():
            batch = self.schedule()
            if point == "computed":
                self.execute(batch)
        self.scheduler.reset()
        self.kv_cache.clear()  # nothing of what was there may be found again
        self.unfinished.clear()
        self.row_of.clear()
        self.stats["resets"] += 1
        self.check_state()
        self.check_nothing_is_left()

    def finish(self) -> None:
        most_steps = 2 * sum(seq.max_total_tokens for seq, _ in self.unfinished.values())
        while self.unfinished:
            self.step()
            most_steps -= 1
            assert most_steps > 0, "no end in sight"
        self.check_nothing_is_left()
        self.stats["preemptions"] += self.scheduler.num_preemptions

    def step(self) -> None:
        if self.scheduler.is_finished():
            return
        num_preemptions = self.scheduler.num_preemptions
        batch = self.schedule()
        self.check_state()
        self.check_batch(batch, self.scheduler.num_preemptions > num_preemptions)
        tokens = self.execute(batch)
        for seq in self.scheduler.update(batch, tokens):
            _, request = self.unfinished.pop(seq.seq_id)
            del self.row_of[seq.seq_id]
            assert (seq.token_ids.tolist(), seq.finish_reason) == undisturbed(request, self.setting.max_model_len)
            self.stats["finished"] += 1
            self.stats["cached tokens"] += seq.num_cached_tokens or 0
        self.check_state()
        self.check_progress()
        assert {*self.scheduler.running, *self.scheduler.waiting} == {seq for seq, _ in self.unfinished.values()}

    def schedule(self) -> ScheduledBatch:
        """The next batch; a row is given to one sequence at a time."""
        batch = self.scheduler.schedule()
        waiting = {seq.seq_id for seq in self.scheduler.waiting}
        for seq_id in waiting & self.row_of.keys():  # preempted
            del self.row_of[seq_id]
        for started in batch.started:
            assert started.row not in self.row_of.values()
            assert started.seq_id not in self.row_of
            self.row_of[started.seq_id] = started.row
        return batch

    def ids_of(self, batch: ScheduledBatch) -> list[int]:
        """The sequences of a batch."""
        seq_of = {row: seq_id for seq_id, row in self.row_of.items()}
        return [seq_of[row] for row in batch.rows.tolist()]

    # ---- the model ----

    def execute(self, batch: ScheduledBatch) -> NDArray[np.int64]:
        """What `ModelRunner.execute` does, with the KV cache and the model simulated."""
        inputs = self.input_batch.apply(batch)
        seq_ids = self.ids_of(batch)
        assert self.input_batch.seq_ids[batch.rows].tolist() == seq_ids
        assert len(set(inputs.slot_mapping.tolist())) == len(inputs.slot_mapping)
        for index, seq_id in enumerate(seq_ids):  # before anything is written: a hit is on what was computed before
            self.check_context(inputs, index, seq_id, int(inputs.context_lens[index] - batch.num_tokens[index]))
        for index in range(len(seq_ids)):
            self.write(inputs, index)
        for index, seq_id in enumerate(seq_ids):  # after all is written: nobody wrote to another's context
            self.check_context(inputs, index, seq_id, int(inputs.context_lens[index]))
        ends = inputs.cu_seqlens_q[1:].tolist()
        sampling = [ends.index(index + 1) for index in inputs.logits_indices.tolist()]
        last = [self.slots(inputs, index, int(inputs.context_lens[index]))[-1] for index in sampling]
        uniforms = self.input_batch.sampling_inputs().uniforms.tolist()
        new = [next_token(self.kv_cache[slot], number) for slot, number in zip(last, uniforms, strict=True)]
        tokens = np.array(new, np.int64)
        self.input_batch.append(tokens)
        return tokens

    def slots(self, inputs: StepInputs, index: int, num_tokens: int) -> list[int]:
        """Where K and V of the first tokens of a sequence are."""
        size, table = self.setting.block_size, inputs.block_tables[index].tolist()
        return [table[position // size] * size + position % size for position in range(num_tokens)]

    def check_context(self, inputs: StepInputs, index: int, seq_id: int, num_tokens: int) -> None:
        tokens = self.unfinished[seq_id][0].token_ids
        for position, slot in enumerate(self.slots(inputs, index, num_tokens)):
            assert self.kv_cache.get(slot) == tuple(tokens[: position + 1]), f"sequence {seq_id}, position {position}"

    def write(self, inputs: StepInputs, index: int) -> None:
        begin, end = inputs.cu_seqlens_q[index : index + 2].tolist()
        slots = self.slots(inputs, index, int(inputs.context_lens[index]))
        assert inputs.slot_mapping[begin:end].tolist() == slots[begin - end :]
        before = self.kv_cache[slots[begin - end - 1]] if len(slots) > end - begin else ()
        for token, slot in zip(inputs.input_ids[begin:end].tolist(), slots[begin - end :], strict=True):
            assert self.manager.blocks[slot // self.setting.block_size].ref_count == 1
            before = self.kv_cache[slot] = (*before, token)

    # ---- what holds at any time ----

    def check_batch(self, batch: ScheduledBatch, has_preempted: bool) -> None:
        seq_ids, num_tokens = self.ids_of(batch), batch.num_tokens.tolist()
        assert seq_ids == sorted(set(seq_ids))
        assert seq_ids == [seq.seq_id for seq in self.scheduler.running][: len(seq_ids)]  # the oldest always goes on
        assert len(num_tokens) == len(seq_ids)
        assert min(num_tokens) >= 1
        assert sum(num_tokens) <= self.setting.max_num_batched_tokens
        assert batch.num_prefill_tokens + batch.num_decode_tokens == sum(num_tokens)
        started_rows = {started.row for started in batch.started}
        assert started_rows <= set(batch.rows.tolist())
        assert {row for row, _ in batch.new_blocks} <= set(self.row_of.values()) - started_rows
        assert not (has_preempted and batch.started)
        oldest_waiting = min((seq.seq_id for seq in self.scheduler.waiting), default=self.next_seq_id)
        self.stats["passed over"] += sum(started.seq_id > oldest_waiting for started in batch.started)
        counts = self.scheduler.running.counts
        left = (counts.num_tokens - counts.num_computed)[: len(seq_ids)]
        assert (batch.num_tokens <= left).all()
        self.stats["chunks"] += int(np.count_nonzero(batch.num_tokens < left))

    def check_state(self) -> None:
        self.scheduler.running.append_recent()
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        assert len(running) <= self.setting.max_num_seqs
        for queue in (running, waiting):
            assert [seq.seq_id for seq in queue] == sorted({seq.seq_id for seq in queue})
        assert all(not seq.block_table and not seq.num_published_blocks for seq in waiting)
        self.check_rows(running)
        self.check_blocks(running)
        self.check_prefix_cache(running)

    def check_rows(self, running: list[Sequence]) -> None:
        scheduler = self.scheduler
        assert self.row_of.keys() == {seq.seq_id for seq in running}
        rows = [self.row_of[seq.seq_id] for seq in running]
        counts = scheduler.running.counts
        assert counts.row.tolist() == rows
        assert sorted([*rows, *scheduler.running.free_rows]) == list(range(self.setting.max_num_seqs))
        assert counts.num_tokens.tolist() == [len(seq) for seq in running]
        assert (counts.num_computed < counts.num_tokens).all()
        assert counts.capacity.tolist() == [len(seq.block_table) * self.setting.block_size for seq in running]

    def check_progress(self) -> None:
        """After a step the scheduler and the model runner agree on how far each sequence is."""
        counts, decodes = self.scheduler.running.counts, self.input_batch._decodes
        if decodes is not None:
            self.input_batch._put_back(decodes)
        assert self.input_batch.num_tokens[counts.row].tolist() == counts.num_tokens.tolist()
        assert self.input_batch.num_computed_tokens[counts.row].tolist() == counts.num_computed.tolist()

    def check_blocks(self, running: list[Sequence]) -> None:
        blocks, free = self.manager.blocks, self.manager._free
        held = Counter(block_id for seq in running for block_id in seq.block_table)
        assert [block.ref_count for block in blocks] == [held[block.block_id] for block in blocks]
        assert {block.block_id for block in blocks if block.ref_count == 0} == set(free)
        assert len(held) + self.manager.num_free_blocks == self.setting.num_blocks
        findable = [block.block_hash is not None for block in free.values()]
        assert findable == sorted(findable)  # blank ones are taken first
        counts = self.scheduler.running.counts
        assert (counts.num_computed <= counts.capacity).all()
        for seq in running:
            assert len(set(seq.block_table)) == len(seq.block_table)
            # A block that may still be written to is in one table only.
            assert all(held[block_id] == 1 for block_id in seq.block_table[seq.num_published_blocks :])

    def check_prefix_cache(self, running: list[Sequence]) -> None:
        published = self.manager._published
        assert set(map(id, published.values())) == {
            id(block) for block in self.manager.blocks if block.block_hash is not None
        }
        size = self.setting.block_size
        for block_hash, block in published.items():
            assert block.block_hash == block_hash
            slots = range(block.block_id * size, (block.block_id + 1) * size)
            prefix = self.kv_cache[slots[-1]]  # all of it was computed, and is still there
            assert [self.kv_cache.get(slot) for slot in slots] == [prefix[: len(prefix) - left] for left in range(size)][
                ::-1
            ]
            assert block.token_ids.tolist() == list(prefix[-size:])
            assert self.chained_hash(prefix) == block_hash
        writable = {
            seq.block_table[index]: seq.block_hashes[index]
            for seq in running
            for index in range(seq.num_published_blocks, min(len(seq.block_table), len(seq.block_hashes)))
        }
        for block_hash, block in self.manager._being_computed.items():
            assert writable.get(block.block_id) == block_hash

    def chained_hash(self, prefix: Prefix) -> int:
        block_hash = ROOT
        for start in range(0, len(prefix), self.setting.block_size):
            block_hash = self.hash_function(block_hash, array("i", prefix[start : start + self.setting.block_size]))
        return block_hash

    def check_nothing_is_left(self) -> None:
        assert self.scheduler.is_finished()
        assert self.manager.num_free_blocks == self.setting.num_blocks
        assert not self.manager._being_computed
        assert sorted(self.scheduler.running.free_rows) == list(range(self.setting.max_num_seqs))


def simulate(random: Random, hash_name: str, prefix_caching: bool = True) -> Counter[str]:
    """Run a random script. Returns how often what was to be tested happened."""
    setting, actions = make_script(random)
    simulation = Simulation(setting, HASH_FUNCTIONS[hash_name], prefix_caching)
    simulation.run(actions)
    return simulation.stats


@pytest.mark.parametrize("hash_name", HASH_FUNCTIONS)
@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False), prefix_caching=st.sampled_from([True, True, True, False]))
def test_random_lives(hash_name: str, random: Random, prefix_caching: bool) -> None:
    """Hypothesis chooses: it goes to extremes, and gives the shortest script that fails."""
    simulate(random, hash_name, prefix_caching)


@pytest.mark.parametrize("hash_name", HASH_FUNCTIONS)
def test_ordinary_random_lives(hash_name: str) -> None:
    """Evenly distributed, so longer and more crowded; and all that can happen does happen."""
    stats = sum((simulate(Random(seed), hash_name) for seed in range(100)), Counter())
    for event in ("finished", "preemptions", "resets", "cached tokens", "chunks", "passed over"):
        assert stats[event] >= 20, event


def test_ordinary_random_lives_without_prefix_caching() -> None:
    stats = sum((simulate(Random(seed), "xxh64", prefix_caching=False) for seed in range(100)), Counter())
    for event in ("finished", "preemptions", "resets", "chunks"):
        assert stats[event] >= 20, event
    assert stats["cached tokens"] == stats["passed over"] == 0
