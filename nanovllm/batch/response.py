"""Lines of the output: results in the shape of OpenAI's batch format."""

from itertools import accumulate
from typing import Any

from nanovllm.batch.requests import BatchRequest
from nanovllm.batch.results import ROW_ID
from nanovllm.batch.rows import BadRow
from nanovllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput, TokenLogprob

LONGEST_MESSAGE = 1000  # what is wrong in a row may be any number of characters


def completions_of(output: RequestOutput) -> list[CompletionOutput]:
    """All completions of a request, one or several."""
    return output["completions"] if "completions" in output else [output]  # noqa: SIM401  # mypy sees the types so


def error_line(bad: BadRow) -> dict[str, Any]:
    """The result of a row that could not be run."""
    error = {"code": bad.code, "message": bad.message[:LONGEST_MESSAGE]}
    return {"id": ROW_ID.format(bad.number), "custom_id": bad.custom_id, "response": None, "error": error}


def result_line(row: BatchRequest, output: RequestOutput, model: str, created: int) -> dict[str, Any]:
    """The result of a row that ran.

    Args:
        row, output: the request and what came of it.
        model: what to call the model.
        created: when, in seconds since 1970.
    """
    completions = completions_of(output)
    make_choice = _chat_choice if row.is_chat else _text_choice
    num_completion_tokens = sum(len(completion["token_ids"]) for completion in completions)
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if row.is_chat else 'cmpl'}-{row.number}",
        "object": "chat.completion" if row.is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [make_choice(index, completion) for index, completion in enumerate(completions)],
        "usage": {
            "prompt_tokens": output["num_prompt_tokens"],
            "completion_tokens": num_completion_tokens,
            "total_tokens": output["num_prompt_tokens"] + num_completion_tokens,
        },
    }
    if output["prompt_logprobs"] is not None:
        body["prompt_logprobs"] = [None if one is None else _by_token_id(one) for one in output["prompt_logprobs"]]
    name = ROW_ID.format(row.number)
    response = {"status_code": 200, "request_id": name, "body": body}
    return {"id": name, "custom_id": row.custom_id, "response": response, "error": None}


def _chat_choice(index: int, completion: CompletionOutput) -> dict[str, Any]:
    logprobs = completion["logprobs"]
    return {
        "index": index,
        "message": {"role": "assistant", "content": completion["text"]},
        "logprobs": None if logprobs is None else {"content": list(map(_chat_logprob, completion["token_ids"], logprobs))},
        "finish_reason": completion["finish_reason"],
        "stop_reason": completion["stop_reason"],
    }


def _chat_logprob(token_id: int, position: PositionLogprobs) -> dict[str, Any]:
    return {**_named(_chosen(token_id, position)), "top_logprobs": [_named(one) for one in position]}


def _named(one: TokenLogprob) -> dict[str, Any]:
    token_bytes = list(one["token"].encode("utf-8", "surrogatepass"))
    return {"token": one["token"], "logprob": one["logprob"], "bytes": token_bytes}


def _text_choice(index: int, completion: CompletionOutput) -> dict[str, Any]:
    logprobs = completion["logprobs"]
    return {
        "index": index,
        "text": completion["text"],
        "logprobs": None if logprobs is None else _text_logprobs(completion["token_ids"], logprobs),
        "finish_reason": completion["finish_reason"],
        "stop_reason": completion["stop_reason"],
    }


def _text_logprobs(token_ids: list[int], logprobs: list[PositionLogprobs]) -> dict[str, Any]:
    chosen = list(map(_chosen, token_ids, logprobs))
    tokens = [one["token"] for one in chosen]
    return {
        "tokens": tokens,
        "token_logprobs": [one["logprob"] for one in chosen],
        "top_logprobs": [{one["token"]: one["logprob"] for one in position} for position in logprobs],
        "text_offset": [0, *accumulate(map(len, tokens))][: len(tokens)],
    }


def _chosen(token_id: int, position: PositionLogprobs) -> TokenLogprob:
    return next(one for one in position if one["token_id"] == token_id)


def _by_token_id(position: PositionLogprobs) -> dict[str, Any]:
    return {
        str(one["token_id"]): {"logprob": one["logprob"], "rank": one["rank"], "decoded_token": one["token"]}
        for one in position
    }
