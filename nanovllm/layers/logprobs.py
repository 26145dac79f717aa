"""Log-probabilities of tokens, of the model's own distribution: before temperature, penalties and filters (vLLM's default).

Like the sampler, a few rows at a time, and no row depends on another.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

ROWS_AT_A_TIME = 16
HEAD_ROWS = 64  # hidden states whose logits exist at the same time


class Logprobs(NamedTuple):
    """The k most likely tokens, most likely first, and one chosen token, at each of some positions."""

    token_ids: NDArray[np.int64]  # [num_rows, k]
    logprobs: NDArray[np.float32]  # [num_rows, k]
    chosen_ids: NDArray[np.int64]  # [num_rows]
    chosen_logprobs: NDArray[np.float32]  # [num_rows]
    chosen_ranks: NDArray[np.int64]  # [num_rows]: 1 for the most likely


def compute_logprobs(logits: Tensor, chosen_ids: Tensor, k: int) -> Logprobs:
    """Log-probabilities of the k best tokens and the chosen one.

    Args:
        logits: [num_rows, vocab_size].
        chosen_ids: int64 [num_rows], on the logits' device.
        k: at least 0; never more than there are tokens are returned.
    """
    parts = [
        _compute_some(rows.float(), chosen, min(k, logits.shape[-1]))
        for rows, chosen in zip(logits.split(ROWS_AT_A_TIME), chosen_ids.split(ROWS_AT_A_TIME), strict=True)
    ]
    return join_logprobs([Logprobs(*(column.cpu().numpy() for column in part)) for part in parts])


def join_logprobs(parts: list[Logprobs]) -> Logprobs:
    """One after the other; at least one, all with the same k."""
    return Logprobs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _compute_some(logits: Tensor, chosen_ids: Tensor, k: int) -> tuple[Tensor, ...]:
    total = logits.logsumexp(dim=-1, keepdim=True)
    best, token_ids = logits.topk(k, dim=-1)
    chosen = logits.gather(1, chosen_ids.unsqueeze(1))
    ranks = (logits > chosen).sum(dim=-1) + 1
    return token_ids, best - total, chosen_ids, (chosen - total).squeeze(1), ranks


def compute_prompt_logprobs(hidden_states: Tensor, chosen_ids: Tensor, k: int, head: Callable[[Tensor], Tensor]) -> Logprobs:
    """The same from hidden states [num_rows, hidden_size], never with the logits of more than a few rows at once."""
    rows = zip(hidden_states.split(HEAD_ROWS), chosen_ids.split(HEAD_ROWS), strict=True)
    return join_logprobs([compute_logprobs(head(states), chosen, k) for states, chosen in rows])
