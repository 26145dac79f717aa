"""Running: sequences come, get tokens and go in random order; what is counted of each stays its own."""

from random import Random

import numpy as np
import pytest

from nanovllm.engine.running import Running
from nanovllm.engine.scheduled_batch import StartedSequence
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

BLOCK_SIZE, MAX_NUM_SEQS = 4, 6
PARAMS = SamplingParams()


def start(running: Running, seq: Sequence, num_computed_tokens: int = 0) -> StartedSequence:
    return StartedSequence(
        row=running.free_rows.pop(),
        seq_id=seq.seq_id,
        token_ids=seq.token_ids[:],
        num_prompt_tokens=seq.num_prompt_tokens,
        num_computed_tokens=num_computed_tokens,
        block_table=(0,) * -(-len(seq) // BLOCK_SIZE),
        sampling_params=PARAMS,
        seed=0,
    )


def add(running: Running, *sequences: Sequence) -> None:
    running.add(list(sequences), [start(running, seq) for seq in sequences])
    assert [seq.seq_id for seq in running] == sorted(seq.seq_id for seq in running)


def make_seq(seq_id: int, length: int = 3) -> Sequence:
    return Sequence(seq_id, [1000 + seq_id] * length, PARAMS, seed=0, max_total_tokens=10**6)


def test_counts_of_a_sequence_that_starts() -> None:
    running = Running(MAX_NUM_SEQS, BLOCK_SIZE)
    seq = make_seq(3, length=9)
    running.add([seq], [start(running, seq, num_computed_tokens=8)])
    counts = {name: values.tolist() for name, values in running.counts._asdict().items()}
    assert counts == {
        "row": [MAX_NUM_SEQS - 1],
        "num_tokens": [9],
        "num_computed": [8],
        "next_full_block": [12],
        "capacity": [12],
        "max_total_tokens": [10**6],
        "in_prefill": [1],
    }


def test_they_are_in_order_of_arrival_with_their_counts() -> None:
    running = Running(MAX_NUM_SEQS, BLOCK_SIZE)
    add(running, make_seq(4, 40), make_seq(6, 60))
    add(running, make_seq(5, 50), make_seq(7, 70))
    assert [seq.seq_id for seq in running] == [4, 5, 6, 7]
    assert running.counts.num_tokens.tolist() == [40, 50, 60, 70]
    rows = running.counts.row.tolist()
    assert [seq.seq_id for seq in running.remove([0, 2])] == [4, 6]
    assert [running[position].seq_id for position in range(len(running))] == [5, 7]
    assert running.counts.num_tokens.tolist() == [50, 70]
    assert running.counts.row.tolist() == [rows[1], rows[3]]
    assert running.free_rows[-2:] == [rows[0], rows[2]]


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 64, 200])
@pytest.mark.parametrize("length", [1, 5, 31, 32])
def test_tokens_come_to_the_sequence_however_late(length: int, num_tokens: int) -> None:
    running = Running(MAX_NUM_SEQS, BLOCK_SIZE)
    late, newer = make_seq(0, length), make_seq(1, 7)
    add(running, late, newer)
    for token_id in range(num_tokens):
        running.add_tokens(slice(2), np.array([token_id, -token_id]))
        assert running.counts.num_tokens.tolist() == [length + token_id + 1, 7 + token_id + 1]
    assert running.up_to_date(1).completion_token_ids == [-token_id for token_id in range(num_tokens)]
    (removed,) = running.remove([0])
    assert removed is late
    assert late.completion_token_ids == list(range(num_tokens))


@pytest.mark.parametrize("seed", range(20))
def test_random_lives(seed: int) -> None:
    random = Random(seed)
    running = Running(MAX_NUM_SEQS, BLOCK_SIZE)
    expected: dict[int, list[int]] = {}  # by sequence, its output
    preempted: list[Sequence] = []
    next_id = 0
    for step in range(300):
        while running.free_rows and random.random() < 0.3:
            if preempted and random.random() < 0.5:
                seq = preempted.pop()
            else:
                seq, next_id = make_seq(next_id, random.randint(1, 40)), next_id + 1
                expected[seq.seq_id] = []
            add(running, seq)
        if len(running) and random.random() < 0.1:
            for seq in running.remove(sorted(random.sample(range(len(running)), random.randint(1, len(running))))):
                assert seq.completion_token_ids == expected[seq.seq_id]
                if random.random() < 0.5:
                    preempted.append(seq)
        positions = sorted(random.sample(range(len(running)), random.randint(0, len(running))))
        running.add_tokens(np.array(positions, np.int64), step * 100 + np.array(positions, np.int64))
        for position in positions:
            expected[running[position].seq_id].append(step * 100 + position)
        assert running.counts.num_tokens.tolist() == [
            seq.num_prompt_tokens + len(expected[seq.seq_id]) for seq in running.sequences
        ]
        if random.random() < 0.02:
            running.append_recent()
            assert [seq.completion_token_ids for seq in running] == [expected[seq.seq_id] for seq in running]
    assert sorted([*running.counts.row.tolist(), *running.free_rows]) == list(range(MAX_NUM_SEQS))
