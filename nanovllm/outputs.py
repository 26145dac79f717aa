"""What `LLM.generate` returns: plain dicts, ready for JSON, typed here."""

from typing import Literal, TypedDict

FinishReason = Literal["stop", "length"]


class RequestOutput(TypedDict):
    """The completion of one prompt.

    text: the generated text, special tokens left out; "" when the checkpoint has no tokenizer.
    token_ids: the generated tokens, an end-of-sequence token included when one ended it.
    finish_reason: "stop" at an end-of-sequence token, "length" at `max_tokens` or `max_model_len`.
    num_prompt_tokens: tokens of the prompt.
    num_cached_tokens: how many of those were found in the prefix cache when the request first ran.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
