"""RequestLimits: what a request must keep to so that it can run to its end."""

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.stop_tokens import StopTokens
from nanovllm.sampling_params import SamplingParams


class RequestLimits:
    """The limits that a model and its KV cache set.

    Args:
        vocab_size: of the model.
        max_model_len: tokens of the longest sequence.
        block_manager: of the KV cache.
        stop_tokens: which tokens end a sequence.
        has_tokenizer: whether the checkpoint has one.
    """

    def __init__(
        self,
        vocab_size: int,
        max_model_len: int,
        block_manager: BlockManager,
        stop_tokens: StopTokens,
        *,
        has_tokenizer: bool,
    ) -> None:
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._block_manager = block_manager
        self._stop_tokens = stop_tokens
        self._has_tokenizer = has_tokenizer

    def max_total_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Where generation stops at the latest: prompt and output tokens together."""
        return min(num_prompt_tokens + params.max_tokens, self._max_model_len)

    def check_length(self, name: str, num_prompt_tokens: int, params: SamplingParams) -> None:
        """Check that a prompt leaves room for a token, and that the KV cache can hold the sequence to its end.

        Raises:
            ValueError: it does not; the message calls the request `name`.
        """
        if num_prompt_tokens >= self._max_model_len:
            raise ValueError(
                f"{name} has {num_prompt_tokens} tokens; with max_model_len={self._max_model_len} a prompt has at "
                f"most {self._max_model_len - 1}. Shorten it or raise max_model_len"
            )
        manager = self._block_manager
        # The last token is sampled but never computed, so it needs no place in the cache.
        needed = manager.num_blocks_for(self.max_total_tokens(num_prompt_tokens, params) - 1)
        if needed > manager.num_blocks:
            raise ValueError(
                f"{name} with {num_prompt_tokens} tokens and max_tokens={params.max_tokens} needs {needed} KV "
                f"blocks of {manager.block_size} tokens; the cache has {manager.num_blocks}. Lower max_tokens, or raise "
                f"num_kvcache_blocks or the memory for the KV cache"
            )

    def check_tokens(self, name: str, params: SamplingParams) -> None:
        """Check what of the sampling parameters depends on the model.

        Raises:
            ValueError: a token outside the vocabulary, or parameters that leave nothing to sample.
        """
        last = self._vocab_size - 1
        for option, token_ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", dict(params.logit_bias)),
        ):
            wrong = [token for token in token_ids if token > last]
            if wrong:
                raise ValueError(f"{option} of {name} has token {wrong[0]}; the vocabulary is 0 to {last}")
        if params.stop and not self._has_tokenizer:
            raise ValueError(f"{name} has stop strings, but the checkpoint has no tokenizer: use stop_token_ids")
        allowed = params.allowed_token_ids if params.min_tokens > 0 else None
        if allowed is not None and self._stop_tokens.of(params).issuperset(allowed):
            raise ValueError(
                f"{name} has allowed_token_ids that all end the output, but min_tokens={params.min_tokens}: "
                f"nothing could be sampled. Allow another token or lower min_tokens"
            )
