"""From the fields of a row to a request, or to the reason why it is none.

What a row may hold is what vLLM's server takes and `SamplingParams` has.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import xxhash

from nanovllm.batch.rows import BadRow, Row, without_nulls
from nanovllm.engine.request_feed import Request
from nanovllm.sampling_params import MAX_SEED, SamplingParams

_SAMPLING = {field.name for field in fields(SamplingParams)}
_OTHERS = {"prompt", "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
_IGNORED = {"model", "user", "metadata", "store", "service_tier"}  # they do not change what is generated
_NEUTRAL: dict[str, tuple[object, ...]] = {  # fields that only these values may have: they ask for nothing
    "stream": (False,),
    "stream_options": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "add_generation_prompt": (True,),
}
_KNOWN = {*_SAMPLING, *_OTHERS, *_IGNORED, *_NEUTRAL}
_OWN = {"prompt", "messages", *_IGNORED}  # all others say how to run a prompt: many rows have them in common
MAX_OPTIONS = 1024  # that are remembered
_NAME = "the prompt"  # in errors: a line of the output says which


class BatchRequest(NamedTuple):
    """A row that the engine can be asked to run."""

    number: int
    custom_id: str | int | None
    is_chat: bool
    request: Request


class Options(NamedTuple):
    """What a row says beside its prompt."""

    params: SamplingParams
    template_args: dict[str, Any]


class RowParser:
    """Makes requests of rows.

    Args:
        defaults: sampling parameters for rows that do not say.
        template_args: the same for the chat template.
        seed: rows without a seed of their own get one that is a function of this and the row's number.
    """

    def __init__(self, defaults: Mapping[str, Any], template_args: Mapping[str, Any], seed: int) -> None:
        self._defaults = {**defaults, "seed": None}
        self._template_args = dict(template_args)
        self._seed = seed
        self._options: dict[str, Options] = {}  # by the fields that they were made of

    def parse(self, row: Row) -> BatchRequest | BadRow:
        """The request of a row."""
        try:
            return self._parse(row)
        except (TypeError, ValueError) as error:
            return BadRow(row.number, row.custom_id, "invalid_request", str(error))

    def _parse(self, row: Row) -> BatchRequest:
        fields = row.fields
        is_chat = "messages" in fields
        if is_chat == ("prompt" in fields):
            raise ValueError("the row must have either prompt or messages" + ", it has both" * is_chat)
        prompt = _check_messages(fields["messages"]) if is_chat else _check_prompt(fields["prompt"])
        options = self._options_of({name: value for name, value in fields.items() if name not in _OWN}, is_chat)
        seed = xxhash.xxh64_intdigest(row.number.to_bytes(8, "little"), self._seed) & MAX_SEED
        request = Request(prompt, options.params, options.template_args, _NAME, seed)
        return BatchRequest(row.number, row.custom_id, is_chat, request)

    def _options_of(self, fields: dict[str, Any], is_chat: bool) -> Options:
        """The options that a row's fields ask for; rows that say the same share them."""
        key = repr((fields, is_chat))  # 1, 1.0 and True are equal, but not as good
        options = self._options.get(key)
        if options is None:
            options = self._make_options(fields, is_chat)
            if len(self._options) >= MAX_OPTIONS:
                self._options.clear()
            self._options[key] = options
        return options

    def _make_options(self, fields: dict[str, Any], is_chat: bool) -> Options:
        _check_known(fields)
        template_args = fields.get("chat_template_kwargs", {})
        if not isinstance(template_args, dict) or (template_args and not is_chat):
            raise ValueError(f"chat_template_kwargs must be an object, beside messages, got {template_args!r:.80}")
        values = {name: value for name, value in fields.items() if name in _SAMPLING}
        values |= _renamed(fields, is_chat)
        params = SamplingParams(**{**self._defaults, **values})
        return Options(params, {**self._template_args, **template_args} if is_chat else {})


def _check_known(fields: Mapping[str, Any]) -> None:
    """Check that there is no field that would be overlooked."""
    for name, value in fields.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise ValueError(f"{name}={value!r:.80} is not supported: leave it out")
        elif name not in _KNOWN:
            nearest = difflib.get_close_matches(name, sorted(_KNOWN), n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown field {name!r}; did you mean {nearest!r}?")


def _check_messages(messages: object) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: contents that come in parts of text are joined."""
    if not isinstance(messages, list) or not messages:
        raise TypeError(f"messages must be a list of objects, not empty, got {messages!r:.80}")
    checked = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TypeError(f"each of messages must be an object with role and content, got {message!r:.80}")
        message = without_nulls(message)
        if isinstance(message.get("content"), list):
            message["content"] = "".join(map(_text_of, message["content"]))
        if not isinstance(message.get("content", ""), str):
            raise TypeError(f"content of a message must be a string, got {message['content']!r:.80}")
        checked.append(message)
    return checked


def _text_of(part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"a part of a message's content must be of type text, got {part!r:.80}")


def _check_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        raise TypeError("prompt must be one string or one list of token ids: give each prompt a row of its own")
    return prompt  # the engine checks it


def _renamed(body: Mapping[str, Any], is_chat: bool) -> dict[str, Any]:
    """The sampling parameters that OpenAI calls, or writes, differently."""
    values: dict[str, Any] = {}
    if "max_completion_tokens" in body:
        if body.get("max_tokens", body["max_completion_tokens"]) != body["max_completion_tokens"]:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        values["max_tokens"] = body["max_completion_tokens"]
    if isinstance(body.get("logit_bias"), dict):
        values["logit_bias"] = {_token_id(token): bias for token, bias in body["logit_bias"].items()}
    if is_chat and "logprobs" in body:
        if not isinstance(body["logprobs"], bool):
            raise TypeError(f"logprobs of a chat must be true or false, got {body['logprobs']!r:.80}: use top_logprobs")
        values["logprobs"] = body.get("top_logprobs", 0) if body["logprobs"] else None
    elif "top_logprobs" in body:
        raise ValueError("top_logprobs needs logprobs to be true" if is_chat else "top_logprobs is for chats: use logprobs")
    return values


def _token_id(name: object) -> object:
    """JSON's keys are strings."""
    return int(name) if isinstance(name, str) and name.isdecimal() else name
