"""What options of a request do to its logits: the order of all operations, and those that come before the temperature.

    1. allowed_token_ids, min_tokens   forbidden tokens are impossible
    2. logit_bias                      added
    3. repetition_penalty              tokens of prompt and output: positive logits are divided by it, others multiplied
    4. frequency_penalty, presence_penalty   subtracted from tokens of the output: times their count, and once
    5. temperature                     0 takes the largest here, and what follows does not matter
    6. top_k                           equals of the k-th are kept
    7. top_p                           of the probabilities that top_k left, which sum to 1; of equals at the boundary, the
                                       lower token ids are kept
    8. min_p                           relative to the largest probability

Where Transformers 5 and vLLM 0.32 agree, this is their order. Where they differ it is Transformers': vLLM applies min_p
before top_k and top_p. Transformers has no frequency and presence penalty; they are where vLLM has them.

Steps 1 to 4 are here, as functions that change float32 logits [num_rows, vocab_size] in place, at the places that `Entries`
name; 5 to 8 are in sampler.py. Forbidding is adding minus infinity, so that a NaN stays one and is found out.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """Places in the logits, and a value for each; all [num_entries]."""

    rows: Tensor  # int64
    tokens: Tensor  # int64
    values: Tensor  # float32

    def to(self, device: torch.device) -> "Entries":
        """The same on `device`."""
        return Entries(*(one.to(device, non_blocking=True) for one in self))


class LogitsEdits(NamedTuple):
    """What a step does to the logits; None where no row needs it."""

    restricted_rows: Tensor | None = None  # int64: the rows that `allowed` names
    allowed: Entries | None = None  # without meaning in its values
    forbidden: Entries | None = None  # value minus infinity
    biases: Entries | None = None
    repetition: Entries | None = None  # value: the penalty; a token may occur more than once
    output_penalties: Entries | None = None  # value: frequency_penalty * count + presence_penalty


def edit_logits(logits: Tensor, edits: LogitsEdits) -> Tensor:
    """Apply steps 1 to 4, in a float32 copy of `logits` [num_rows, vocab_size]; `edits` may be on the host."""
    logits = logits.to(torch.float32, copy=True)
    device = logits.device
    if edits.restricted_rows is not None and edits.allowed is not None:
        keep_only(logits, edits.restricted_rows.to(device, non_blocking=True), edits.allowed.to(device))
    for entries, process in (
        (edits.forbidden, add),
        (edits.biases, add),
        (edits.repetition, penalize_repetition),
        (edits.output_penalties, subtract),
    ):
        if entries is not None:
            process(logits, entries.to(device))
    return logits


def keep_only(logits: Tensor, rows: Tensor, allowed: Entries) -> None:
    """Forbid in `rows` (int64, none twice) all tokens but the allowed ones."""
    kept = logits[allowed.rows, allowed.tokens]
    logits[rows] += float("-inf")
    logits[allowed.rows, allowed.tokens] = kept


def add(logits: Tensor, entries: Entries) -> None:
    """Add a value to each entry, none of which occurs twice."""
    logits[entries.rows, entries.tokens] += entries.values


def subtract(logits: Tensor, entries: Entries) -> None:
    """Subtract a value from each entry, none of which occurs twice."""
    logits[entries.rows, entries.tokens] -= entries.values


def penalize_repetition(logits: Tensor, entries: Entries) -> None:
    """Make tokens less likely, whether their logits are positive or negative (Keskar et al. 2019, "CTRL")."""
    before = logits[entries.rows, entries.tokens]
    logits[entries.rows, entries.tokens] = torch.where(before > 0, before / entries.values, before * entries.values)
