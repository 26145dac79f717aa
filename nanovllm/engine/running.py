"""Running: the sequences that run, in order of arrival, and what is counted of each.

What happens to all of them in every step is done on arrays, so that Python loops only over those to which something special
happens. A sampled token, too, is written to an array first: appending 512 tokens to 512 sequences one by one takes longer
than all else that the scheduler does in a step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.scheduled_batch import IntArray, StartedSequence
from nanovllm.engine.sequence import Sequence

Positions = slice | IntArray  # of running sequences
_RECENT = 32  # tokens of a sequence that need not have been appended to it yet; a power of two


class Counts(NamedTuple):
    """Of each running sequence one number, int64."""

    row: IntArray  # its index in the arrays of the model runners, for as long as it runs
    num_tokens: IntArray  # prompt and output
    num_computed: IntArray  # of these, whose K and V are in the cache
    next_full_block: IntArray  # as many computed tokens will fill the next block
    capacity: IntArray  # tokens that its blocks can hold
    max_total_tokens: IntArray
    in_prefill: IntArray  # 1 if no token was sampled since it started, or started again, else 0


class Running:
    """The running sequences; indexing and iterating give them in order of arrival.

    `counts` is made anew whenever sequences come or go; between that its numbers are changed in place, but for the rows.

    Args:
        max_num_seqs: rows.
        block_size: tokens in a KV block.
    """

    def __init__(self, max_num_seqs: int, block_size: int) -> None:
        self.block_size = block_size
        self.free_rows = list(range(max_num_seqs))
        self.sequences: list[Sequence] = []
        self._set_counts(np.zeros((len(Counts._fields), 0), np.int64))
        # By row: the token at position p of its sequence is at p % _RECENT.
        self._recent = np.zeros((max_num_seqs, _RECENT), np.int32)
        self._num_appends = 0

    def _set_counts(self, table: NDArray[np.int64]) -> None:
        self._table = table  # a line for each field
        self.counts = Counts(*table)

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences)

    def __getitem__(self, position: int) -> Sequence:
        return self.sequences[position]

    # ---- who runs ----

    def add(self, sequences: list[Sequence], started: list[StartedSequence]) -> None:
        """Let more run. What each starts with tells how far it is.

        sequences: in order of arrival; they may be older than some that run.
        """
        lengths = np.array([len(seq) for seq in sequences])
        num_computed = np.array([one.num_computed_tokens for one in started])
        counts = Counts(
            row=np.array([one.row for one in started]),
            num_tokens=lengths,
            num_computed=num_computed,
            next_full_block=num_computed + self.block_size,  # only full blocks are found in the prefix cache
            capacity=np.array([len(one.block_table) for one in started]) * self.block_size,
            max_total_tokens=np.array([seq.max_total_tokens for seq in sequences]),
            in_prefill=np.ones_like(lengths),
        )
        merged, table = self.sequences + sequences, np.append(self._table, np.stack(counts), axis=1)
        if self.sequences and sequences[0].seq_id < self.sequences[-1].seq_id:
            order = sorted(range(len(merged)), key=lambda position: merged[position].seq_id)
            merged, table = [merged[position] for position in order], table[:, order]
        self.sequences = merged
        self._set_counts(table)

    def remove(self, positions: list[int]) -> list[Sequence]:
        """Let some run no longer, of ascending positions.

        Returns:
            They, with all their tokens.
        """
        removed = list(map(self.up_to_date, positions))
        self.free_rows += self.counts.row[positions].tolist()
        stays = np.ones(len(self.sequences), np.bool_)
        stays[positions] = False
        self._set_counts(self._table[:, stays])
        for position in reversed(positions):
            del self.sequences[position]
        return removed

    # ---- their tokens ----

    def add_tokens(self, positions: Positions, token_ids: NDArray[np.integer]) -> None:
        """Give one token each to the sequences at some positions; `append_recent` brings it to their `token_ids`."""
        counts = self.counts
        lengths = counts.num_tokens[positions]
        self._recent[counts.row[positions], lengths & (_RECENT - 1)] = token_ids
        counts.num_tokens[positions] = lengths + 1
        self._num_appends += 1
        if self._num_appends % _RECENT == 0:
            self.append_recent()

    def append_recent(self) -> None:
        """Bring the `token_ids` of all up to date."""
        recent, size = self._recent.tobytes(), self._recent.strides[0]
        counts = self.counts
        for seq, row, end in zip(self.sequences, counts.row.tolist(), counts.num_tokens.tolist(), strict=True):
            _append(seq, recent[size * row : size * (row + 1)], end)

    def up_to_date(self, position: int) -> Sequence:
        """The sequence at a position, with all its tokens."""
        counts, seq = self.counts, self.sequences[position]
        num_tokens = int(counts.num_tokens[position])
        if len(seq.token_ids) < num_tokens:
            _append(seq, self._recent[counts.row[position]].tobytes(), num_tokens)
        return seq


def _append(seq: Sequence, recent: bytes, num_tokens: int) -> None:
    """Append what a sequence of `num_tokens` tokens lacks of them, out of its row of the recent ones."""
    token_ids = seq.token_ids
    num_missing, place = num_tokens - len(token_ids), len(token_ids) % _RECENT
    size = token_ids.itemsize
    token_ids.frombytes((2 * recent)[size * place : size * (place + num_missing)])  # twice: they may go on at its beginning
