"""StopTokens: which tokens end a sequence."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from nanovllm.sampling_params import SamplingParams


class StopTokens:
    """The model's end-of-sequence tokens, and those that requests name.

    Args:
        eos_token_ids: the model's.
    """

    def __init__(self, eos_token_ids: Collection[int] = ()) -> None:
        self.eos_token_ids = frozenset(eos_token_ids)
        self._is_watched = np.zeros(1, np.bool_)  # by token; the last stands for all above
        self._watch(eos_token_ids)

    def of(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a sequence with these parameters."""
        return frozenset(params.stop_token_ids) if params.ignore_eos else self.eos_token_ids.union(params.stop_token_ids)

    def watch(self, params: SamplingParams) -> None:
        """Look for the stop tokens of a request from now on."""
        if params.stop_token_ids:
            self._watch(tuple(params.stop_token_ids))

    def among(self, token_ids: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which of the tokens end some sequence, if not theirs."""
        return self._is_watched.take(token_ids, mode="clip")

    def _watch(self, token_ids: Collection[int]) -> None:
        missing = max(token_ids, default=-1) + 2 - len(self._is_watched)
        if missing > 0:
            self._is_watched = np.append(self._is_watched, np.zeros(missing, np.bool_))
        self._is_watched[list(token_ids)] = True
