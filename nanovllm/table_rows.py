"""RowReader: what the rows of a table ask for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nanovllm.engine.request_feed import Request
from nanovllm.sampling_params import MAX_SEED, SamplingParams, check_int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Makes requests of rows, dicts from columns to values.

    A row has a prompt (a string or token ids) or messages (a list of dicts with role and content, for the checkpoint's chat
    template); the other of the two is null or missing. It may have sampling parameters of its own, a dict of those that
    replace `sampling_params`. A null in it, or in a message, says nothing: tables put them where other rows say something.

    Args:
        sampling_params: for all rows. One completion a row, without log-probabilities: there are no columns for more.
        seed: makes what is sampled a function of this seed and the row's own values (all columns), so that a retry, or
            another number of engines, gives the same text; equal rows get equal texts. None: every run draws anew.
        prompt_column, messages_column, sampling_params_column: their names.
        chat_template_args: passed on to the chat template, such as {"enable_thinking": False}.

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    prompt_column: str = "prompt"
    messages_column: str = "messages"
    sampling_params_column: str = "sampling_params"
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.sampling_params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {type(self.sampling_params).__name__}")
        _check_has_columns(self.sampling_params)
        if self.seed is not None:
            check_int("seed", self.seed, minimum=0, maximum=MAX_SEED)

    def needed_columns(self, names: list[str]) -> list[str]:
        """Which of a table's columns make its requests: all, if seeds are made of them.

        Raises:
            ValueError: there are neither prompts nor messages.
        """
        if self.prompt_column not in names and self.messages_column not in names:
            raise ValueError(f"rows have no column {self.prompt_column!r} or {self.messages_column!r}, but {names}")
        wanted = (self.prompt_column, self.messages_column, self.sampling_params_column)
        return [name for name in names if self.seed is not None or name in wanted]

    def make_request(self, row: dict[str, Any]) -> Request:
        """What the engine is asked for.

        Raises:
            TypeError, ValueError: the row cannot be run; what depends on the model is checked by the engine.
        """
        row = _without_nulls(row)
        prompt, messages = row.get(self.prompt_column), row.get(self.messages_column)
        if (prompt is None) == (messages is None):
            found = "neither" if prompt is None else "both"
            raise ValueError(f"a row needs {self.prompt_column!r} or {self.messages_column!r}, this one has {found}")
        if messages is not None and not (isinstance(messages, list) and all(isinstance(one, dict) for one in messages)):
            raise TypeError(f"{self.messages_column!r} must be a list of messages, structs of role and content")
        params = self._sampling_params_of(row)
        if params.seed is None and self.seed is not None:
            params = replace(params, seed=_row_seed(self.seed, row))
        content: Any = prompt if messages is None else messages
        return Request(content, params, self.chat_template_args, name="the prompt")

    def _sampling_params_of(self, row: dict[str, Any]) -> SamplingParams:
        options = row.get(self.sampling_params_column)
        if options is None:
            return self.sampling_params
        if not isinstance(options, dict):
            raise TypeError(f"{self.sampling_params_column!r} must be a struct, got {type(options).__name__}")
        biases = options.get("logit_bias")
        if isinstance(biases, dict):  # the names of a struct's fields are strings
            options = {**options, "logit_bias": {int(token): bias for token, bias in biases.items()}}
        params = replace(self.sampling_params, **options)
        _check_has_columns(params)
        return params


def _check_has_columns(params: SamplingParams) -> None:
    for name, only in (("n", 1), ("logprobs", None), ("prompt_logprobs", None)):
        value = getattr(params, name)
        if value != only:
            raise ValueError(f"{name} must be {only} here, got {value}: there is no column for it")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _row_seed(seed: int, row: dict[str, Any]) -> int:
    """A function of the seed and the row's values."""
    content = json.dumps([seed, row], sort_keys=True, default=repr)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") & MAX_SEED
