"""InputBatch against a computation of the same inputs token by token."""

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest

from nanovllm.engine.input_batch import InputBatch
from nanovllm.engine.scheduled_batch import ScheduledBatch, StartedSequence
from nanovllm.engine.step_inputs import StepInputs
from nanovllm.layers.random_numbers import uniform
from nanovllm.sampling_params import SamplingParams


@dataclass
class Row:
    """What is known of one running sequence."""

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    block_table: list[int]
    temperature: float = 1.0
    seed: int = 0
    num_computed_tokens: int = 0
    index: int = 0
    repetition_penalty: float = 1.0

    def start(self) -> StartedSequence:
        return StartedSequence(
            row=self.index,
            seq_id=self.seq_id,
            token_ids=array("i", self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            num_computed_tokens=self.num_computed_tokens,
            block_table=tuple(self.block_table),
            sampling_params=SamplingParams(temperature=self.temperature, repetition_penalty=self.repetition_penalty),
            seed=self.seed,
        )


def make_batch(
    work: Items[tuple[Row, int]],
    started: Items[Row] = (),
    new_blocks: Items[tuple[int, int]] = (),
) -> ScheduledBatch:
    num_decode = sum(row.num_prompt_tokens <= row.num_computed_tokens == len(row.token_ids) - 1 for row, _ in work)
    return ScheduledBatch(
        started=tuple(row.start() for row in started),
        new_blocks=tuple(new_blocks),
        rows=np.array([row.index for row, _ in work], np.int64),
        num_tokens=np.array([num_tokens for _, num_tokens in work], np.int64),
        num_prefill_tokens=sum(num_tokens for _, num_tokens in work) - num_decode,
        num_decode_tokens=num_decode,
    )


def expect(inputs: StepInputs, input_batch: InputBatch, work: Items[tuple[Row, int]]) -> list[Row]:
    """Check the inputs of a step, token by token, and take the tokens as computed.

    Returns:
        Whose last token is in the step.
    """
    block_size = input_batch.block_size
    token_ids, positions, slots, ends, indices, sampled = [], [], [], [0], [], []
    for index, (row, num_tokens) in enumerate(work):
        for position in range(row.num_computed_tokens, row.num_computed_tokens + num_tokens):
            token_ids.append(row.token_ids[position])
            positions.append(position)
            slots.append(row.block_table[position // block_size] * block_size + position % block_size)
        row.num_computed_tokens += num_tokens
        ends.append(len(slots))
        if row.num_computed_tokens == len(row.token_ids):
            indices.append(len(slots) - 1)
            sampled.append(row)
        num_blocks = -(-row.num_computed_tokens // block_size)
        assert inputs.block_tables[index, :num_blocks].tolist() == row.block_table[:num_blocks]
    assert inputs.input_ids.tolist() == token_ids
    assert inputs.positions.tolist() == positions
    assert inputs.slot_mapping.tolist() == slots
    assert inputs.cu_seqlens_q.tolist() == ends
    assert inputs.context_lens.tolist() == [row.num_computed_tokens for row, _ in work]
    assert inputs.max_seqlen_q == max(num_tokens for _, num_tokens in work)
    assert inputs.max_context_len == max(row.num_computed_tokens for row, _ in work)
    assert inputs.block_tables.shape == (len(work), -(-inputs.max_context_len // block_size))
    assert inputs.logits_indices.tolist() == indices
    assert inputs.sampled_rows.tolist() == [row.index for row in sampled]
    assert input_batch.seq_ids[inputs.sampled_rows].tolist() == [row.seq_id for row in sampled]
    return sampled


def expected_uniform(row: Row) -> float:
    """The number that picks the next output token of `row`."""
    index = len(row.token_ids) - row.num_prompt_tokens
    return float(uniform(np.array([row.seed], np.uint64), np.array([index], np.uint64))[0])


def apply(input_batch: InputBatch, work: Items[tuple[Row, int]], **changes: Items[object]) -> list[float]:
    """One step, checked; sequences whose last token was in it get the next one.

    Returns:
        The numbers to pick these with.
    """
    inputs = input_batch.apply(make_batch(work, **changes))  # type: ignore[arg-type]
    sampled = expect(inputs, input_batch, work)
    how = input_batch.sampling_inputs()
    assert how.temperatures.tolist() == [np.float32(row.temperature) for row in sampled]
    assert how.uniforms.tolist() == [expected_uniform(row) for row in sampled]
    new = [300 + 7 * row.seq_id + len(row.token_ids) for row in sampled]
    input_batch.append(np.array(new, np.int64))
    for row, token_id in zip(sampled, new, strict=True):
        row.token_ids.append(token_id)
    return how.uniforms.tolist()


class RandomLife:
    """Random steps over sequences that arrive, are cut in chunks, decode, are preempted, start again and end."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.max_num_seqs = self.random.randint(1, 6)
        self.max_model_len = self.random.randint(2, 40)
        self.block_size = self.random.choice([1, 2, 4, 16, 32])
        self.input_batch = InputBatch(self.max_num_seqs, self.max_model_len, self.block_size)
        self.running: list[Row] = []
        self.preempted: list[Row] = []
        self.free = list(range(self.max_num_seqs))
        self.next_id = 0

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.release()
            started = self.start() or ([] if self.running else [self.run_one()])
            self.running.sort(key=lambda row: row.seq_id)
            new_blocks = [
                (row.index, self.add_block(row)) for row in self.running if row not in started and self.is_full(row)
            ]
            number = self.random.randint(1, len(self.running))
            chosen = sorted({*map(self.running.index, started), *self.random.sample(range(len(self.running)), number)})
            work = [(row, self.chunk(row)) for row in map(self.running.__getitem__, chosen)]
            apply(self.input_batch, work, started=started, new_blocks=new_blocks)

    def release(self) -> None:
        ended = [row for row in self.running if len(row.token_ids) == self.max_model_len or self.random.random() < 0.1]
        lost = [row for row in self.running if row not in ended and self.random.random() < 0.1]
        self.running = [row for row in self.running if row not in ended and row not in lost]
        self.preempted += lost
        self.free += [row.index for row in ended + lost]

    def start(self) -> list[Row]:
        started: list[Row] = []
        while self.free and self.random.random() < 0.6:
            started.append(self.run_one())
        return started

    def run_one(self) -> Row:
        """A new or a preempted sequence, in any row that is free."""
        row = self.resume(self.preempted.pop()) if self.preempted and self.random.random() < 0.7 else self.arrive()
        row.index = self.free.pop(self.random.randrange(len(self.free)))
        self.running.append(row)
        return row

    def arrive(self) -> Row:
        length = self.random.randint(1, self.max_model_len - 1)
        token_ids = [self.random.randrange(2**31) for _ in range(length)]
        temperature = self.random.choice([0.0, 0.3, 1.0, 1e-4])
        row = Row(self.next_id, token_ids, length, [], temperature, seed=self.random.randrange(2**63))
        self.next_id += 1
        return self.resume(row)

    def resume(self, row: Row) -> Row:
        """Blocks for all its tokens, of which some were found in the prefix cache."""
        length = len(row.token_ids)
        row.block_table = [self.random.randrange(2**20) for _ in range(-(-length // self.block_size))]
        row.num_computed_tokens = self.random.randint(0, (length - 1) // self.block_size) * self.block_size
        return row

    def is_full(self, row: Row) -> bool:
        return len(row.token_ids) > len(row.block_table) * self.block_size

    def add_block(self, row: Row) -> int:
        row.block_table.append(self.random.randrange(2**20))
        return row.block_table[-1]

    def chunk(self, row: Row) -> int:
        left = len(row.token_ids) - row.num_computed_tokens
        return left if self.random.random() < 0.5 else self.random.randint(1, left)


@pytest.mark.parametrize("seed", range(60))
def test_random_mixtures_of_chunks_and_decodes(seed: int) -> None:
    RandomLife(seed).run(60)


def test_dtypes() -> None:
    row = Row(0, [5, 6, 7], 3, [2])
    input_batch = InputBatch(2, 8, 4)
    inputs = input_batch.apply(make_batch([(row, 3)], started=[row]))
    for name in ("input_ids", "positions", "slot_mapping", "sampled_rows", "logits_indices"):
        assert getattr(inputs, name).dtype == np.int64, name
    for name in ("cu_seqlens_q", "context_lens", "block_tables"):
        assert getattr(inputs, name).dtype == np.int32, name
    how = input_batch.sampling_inputs()
    assert how.temperatures.dtype == how.uniforms.dtype == np.float32


def test_a_step_in_which_nobody_samples() -> None:
    row = Row(0, [5, 6, 7], 3, [2])
    input_batch = InputBatch(1, 8, 4)
    inputs = input_batch.apply(make_batch([(row, 2)], started=[row]))
    how = input_batch.sampling_inputs()
    for values in (inputs.sampled_rows, inputs.logits_indices, how.temperatures, how.uniforms):
        assert values.shape == (0,)
    assert inputs.logits_indices.dtype == np.int64


def test_slots_beyond_32_bits() -> None:
    row = Row(0, [5, 6], 2, [2**31 - 1])
    inputs = InputBatch(1, 8, 256).apply(make_batch([(row, 2)], started=[row]))
    assert inputs.slot_mapping.tolist() == [(2**31 - 1) * 256, (2**31 - 1) * 256 + 1]


def test_the_inputs_of_a_step_are_not_changed_by_later_steps() -> None:
    """They may still be on their way to a device."""
    input_batch, row = InputBatch(1, 12, 4), Row(0, [5, 6, 7, 8], 4, [2])
    inputs = input_batch.apply(make_batch([(row, 4)], started=[row]))
    before = [np.copy(getattr(inputs, name)) for name in ("input_ids", "slot_mapping", "context_lens", "block_tables")]
    input_batch.append(np.array([9]))
    other = Row(1, [1, 2, 3, 4], 4, [7])
    input_batch.apply(make_batch([(other, 4)], started=[other]))
    after = [getattr(inputs, name) for name in ("input_ids", "slot_mapping", "context_lens", "block_tables")]
    assert all(map(np.array_equal, before, after))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 8])
def test_chunks_across_block_boundaries(chunk_size: int) -> None:
    input_batch, row = InputBatch(2, 32, 4), Row(3, list(range(50, 63)), 13, [9, 2, 5, 0])
    started = [row]
    while row.num_computed_tokens < row.num_prompt_tokens:
        left = row.num_prompt_tokens - row.num_computed_tokens
        apply(input_batch, [(row, min(chunk_size, left))], started=started)
        started = []
    assert len(row.token_ids) == 14


def test_the_batch_keeps_its_order_whatever_the_rows() -> None:
    input_batch = InputBatch(3, 8, 4)
    rows = [Row(seq_id, [seq_id * 10], 1, [seq_id], index=index) for seq_id, index in ((4, 1), (5, 2), (6, 0))]
    apply(input_batch, [(row, 1) for row in rows], started=rows[::-1])
    newer = Row(7, [70], 1, [7], index=rows[0].index)
    apply(input_batch, [(row, 1) for row in (*rows[1:], newer)], started=[newer])
    apply(input_batch, [(rows[1], 1), (newer, 1)])


def test_a_row_is_reused_by_a_shorter_sequence() -> None:
    input_batch = InputBatch(1, 16, 4)
    long = Row(0, list(range(100, 115)), 15, [3, 4, 5, 6], temperature=0.5, seed=11)
    apply(input_batch, [(long, 15)], started=[long])
    short = Row(1, [1, 2], 2, [8], temperature=0.0, seed=12)
    apply(input_batch, [(short, 2)], started=[short])
    for _ in range(6):  # its third block goes where the older sequence had its own
        new_blocks = []
        if len(short.token_ids) > len(short.block_table) * 4:
            short.block_table.append(20 + len(short.token_ids))
            new_blocks = [(0, short.block_table[-1])]
        apply(input_batch, [(short, 1)], new_blocks=new_blocks)


def test_a_preempted_sequence_goes_on_with_the_numbers_that_it_would_have_had() -> None:
    def uniforms(preempt_after: set[int]) -> list[float]:
        input_batch, row = InputBatch(3, 32, 4), Row(0, [1, 2, 3], 3, list(range(8)), seed=42, index=0)
        other = Row(1, [9], 1, [30, 31, 32], index=1)
        numbers: list[float] = []
        started = [row, other]
        for index in range(10):
            work = [(row, len(row.token_ids) - row.num_computed_tokens), (other, 1)]
            numbers.append(apply(input_batch, work, started=started)[0])
            started = []
            if index in preempt_after:
                row.num_computed_tokens = len(row.token_ids) // 8 * 4
                row.index = 2 - row.index  # in another row than before
                started = [row]
        return numbers

    undisturbed = uniforms(set())
    assert len(set(undisturbed)) == 10
    assert uniforms({0, 4, 5, 8}) == undisturbed
    expected = uniform(np.full(10, 42, np.uint64), np.arange(10, dtype=np.uint64))
    assert undisturbed == expected.tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_all_seeds_are_kept_whole(seed: int) -> None:
    row = Row(0, [1], 1, [0], seed=seed)
    apply(InputBatch(1, 4, 4), [(row, 1)], started=[row])


def test_the_token_that_reaches_max_model_len() -> None:
    input_batch, row = InputBatch(2, 6, 4), Row(0, [1, 2, 3, 4, 5], 5, [0, 1])
    other = Row(1, [7], 1, [2], index=1)
    numbers = apply(input_batch, [(row, 5), (other, 1)], started=[row, other])
    assert len(row.token_ids) == 6
    assert len(numbers) == 2
    apply(input_batch, [(other, 1)])


def test_tokens_beyond_max_model_len_touch_no_other_row() -> None:
    input_batch = InputBatch(2, 4, 4)
    rows = [
        Row(0, [1, 2, 3, 4], 4, [0], repetition_penalty=2.0),  # penalties need all tokens
        Row(1, [7, 8], 2, [1], index=1, repetition_penalty=2.0),
    ]
    input_batch.apply(make_batch([(rows[0], 4), (rows[1], 2)], started=rows))
    input_batch.sampling_inputs()
    input_batch.append(np.array([99, 9]))
    assert input_batch.token_ids[1, :3].tolist() == [7, 8, 9]
    rows[1].num_computed_tokens = 2
    rows[1].token_ids.append(9)
    apply(input_batch, [(rows[1], 1)])


def test_nothing_is_left_in_a_row_of_one_that_was_dropped_in_its_prefill() -> None:
    input_batch = InputBatch(2, 8, 4)
    rows = [Row(seq_id, [1, 2, 3, 4, 5], 5, [seq_id, 9], 0.5, seed=9, index=seq_id) for seq_id in range(2)]
    apply(input_batch, [(row, 2) for row in rows], started=rows)
    again = [Row(seq_id, [4, 5], 2, [seq_id + 5], seed=seq_id, index=seq_id) for seq_id in range(2)]  # the same ids, too
    apply(input_batch, [(row, 2) for row in again], started=again)
    apply(input_batch, [(row, 1) for row in again])
