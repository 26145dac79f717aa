"""One request: its tokens, its KV blocks, how it ended.

A `Sequence` is data that others change: `Scheduler` appends tokens and ends it, `BlockManager` alone writes `block_table`,
`block_hashes` and `num_published_blocks`. How far a running sequence has been computed is the scheduler's to know.
"""

from nanovllm.outputs import FinishReason
from nanovllm.sampling_params import SamplingParams


class Sequence:
    """One request.

    Args:
        seq_id: unique in its engine, ascending in order of arrival.
        token_ids: the prompt; a copy is kept.
        sampling_params: how to continue it.
        seed: the request's source of randomness, already drawn when `sampling_params` has none.
        max_total_tokens: where generation stops at the latest: prompt and output tokens together.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "finish_reason",
        "max_total_tokens",
        "num_cached_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "sampling_params",
        "seed",
        "seq_id",
        "token_ids",
    )

    def __init__(
        self, seq_id: int, token_ids: list[int], sampling_params: SamplingParams, seed: int, max_total_tokens: int
    ) -> None:
        self.seq_id = seq_id
        self.token_ids = list(token_ids)  # prompt, then output
        self.num_prompt_tokens = len(token_ids)
        self.sampling_params = sampling_params
        self.seed = seed
        self.max_total_tokens = max_total_tokens
        self.num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache at first admission
        self.finish_reason: FinishReason | None = None
        self.block_table: list[int] = []  # KV block ids: block i holds tokens i * block_size and on
        self.block_hashes: list[int] = []  # chained hashes of the full blocks of tokens; survive preemption
        self.num_published_blocks = 0  # leading blocks of `block_table` that the prefix cache knows

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def completion_token_ids(self) -> list[int]:
        """The generated tokens, a new list."""
        return self.token_ids[self.num_prompt_tokens :]
