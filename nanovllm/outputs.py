"""What `LLM.generate` returns and `LLM.stream` yields: plain dicts, ready for JSON, typed here."""

from typing import Literal, TypedDict

FinishReason = Literal["stop", "length", "abort"]


class TokenLogprob(TypedDict):
    """One token that could have been at some position.

    token_id, token: the token, and its text alone; "" when the checkpoint has no tokenizer.
    logprob: the natural logarithm of its probability in the model's own distribution.
    rank: 1 for the most likely token.
    """

    token_id: int
    token: str
    logprob: float
    rank: int


PositionLogprobs = list[TokenLogprob]  # the k most likely, most likely first, then the chosen one if it is not among them


class CompletionOutput(TypedDict):
    """One completion of a prompt.

    text: the generated text, without the stop string; "" when the checkpoint has no tokenizer.
    token_ids: the generated tokens, with the one that ended it.
    finish_reason: "stop" at an end-of-sequence token or where `stop` or `stop_token_ids` say so, "length" at `max_tokens`
        or `max_model_len`, "abort" when it was aborted.
    stop_reason: the stop string or the token of `stop_token_ids` that ended it.
    logprobs: for each generated token; None unless asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: list[PositionLogprobs] | None


class SeveralCompletions(TypedDict, total=False):
    """What there is with n > 1 only.

    completions: all n of them.
    """

    completions: list[CompletionOutput]


class RequestOutput(CompletionOutput, SeveralCompletions):
    """What became of one prompt; with n > 1 the keys of `CompletionOutput` are those of the first completion.

    num_prompt_tokens: tokens of the prompt.
    num_cached_tokens: how many of those were found in the prefix cache when the request first ran.
    time_to_first_token: seconds from the request's arrival to its first token; None if it was aborted before.
    total_time: seconds from its arrival to its end.
    prompt_logprobs: for each prompt token, None for the first; None unless asked for.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    time_to_first_token: float | None
    total_time: float
    prompt_logprobs: list[PositionLogprobs | None] | None


class StreamEvent(TypedDict):
    """What is new of one completion.

    index: of the prompt.
    completion: which of the n completions.
    request_id: what `LLM.abort` takes.
    text: new text, possibly none: it never ends within a character or within what may become a stop string.
    token_ids: new tokens.
    logprobs: of the new tokens, where the request asked for them; see `CompletionOutput`.
    finish_reason, stop_reason: None until the completion's last event; see `CompletionOutput`.
    """

    index: int
    completion: int
    request_id: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
