"""One request: its tokens, its KV blocks, how it ended.

A `Sequence` is data that others change: `Scheduler` appends tokens (the last ones of a sequence that runs
may be missing, see `Running.append_recent`) and ends it, `BlockManager` alone writes `block_table`,
`block_hashes` and `num_published_blocks`. How far a running sequence has been computed is the scheduler's to know.
"""

import time
from array import array
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

from nanovllm.outputs import FinishReason
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.detokenizer import Detokenizer


class Sequence:
    """One request.

    Args:
        seq_id: unique in its engine, ascending in order of arrival.
        token_ids: the prompt; a copy is kept.
        sampling_params: how to continue it.
        seed: the request's source of randomness, already drawn when `sampling_params` has none.
        max_total_tokens: where generation stops at the latest: prompt and output tokens together.
        prompt_index: which of the prompts that came together this continues.
        completion_index: which of the n completions of that prompt this is.
    """

    __slots__ = (
        "arrival_time",
        "block_hashes",
        "block_table",
        "completion_index",
        "detokenizer",
        "ended_at_stop_token",
        "finish_reason",
        "finish_time",
        "first_token_time",
        "logprobs",
        "max_total_tokens",
        "num_cached_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "prompt_index",
        "prompt_logprobs",
        "sampling_params",
        "seed",
        "seq_id",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        token_ids: Items[int],
        sampling_params: SamplingParams,
        seed: int,
        max_total_tokens: int,
        prompt_index: int = 0,
        completion_index: int = 0,
    ) -> None:
        self.seq_id = seq_id
        self.token_ids = array("i", token_ids)  # prompt, then output; a tenth of a list's memory, and quick to hash
        self.num_prompt_tokens = len(token_ids)
        self.sampling_params = sampling_params
        self.seed = seed
        self.max_total_tokens = max_total_tokens
        self.num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache at first admission
        self.prompt_index = prompt_index
        self.completion_index = completion_index
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None  # the stop string, or the token of stop_token_ids, that ended it
        self.ended_at_stop_token = False  # by an end-of-sequence token or one of stop_token_ids
        self.arrival_time = time.perf_counter()
        self.first_token_time: float | None = None
        self.finish_time: float | None = None
        self.detokenizer: Detokenizer | None = None  # of a request whose text is needed as it comes
        self.logprobs: list[list[tuple[int, float, int]]] = []  # by output token: (token, logprob, rank)
        self.prompt_logprobs: dict[int, list[tuple[int, float, int]]] = {}  # the same by position in the prompt
        self.block_table: list[int] = []  # KV block ids: block i holds tokens i * block_size and on
        self.block_hashes: list[int] = []  # chained hashes of the full blocks of tokens; survive preemption
        self.num_published_blocks = 0  # leading blocks of `block_table` that the prefix cache knows

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def completion_token_ids(self) -> list[int]:
        """The generated tokens, a new list."""
        return self.token_ids[self.num_prompt_tokens :].tolist()

    def text_token_ids(self, start: int = 0) -> list[int]:
        """The generated tokens from the one at `start` on that are text, a new list.

        The stop token that ended the request is none, unless it was asked for.
        """
        end = len(self) - (self.ended_at_stop_token and not self.sampling_params.include_stop_str_in_output)
        return self.token_ids[self.num_prompt_tokens + start : end].tolist()

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are asked for and not all known yet."""
        return self.sampling_params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1
