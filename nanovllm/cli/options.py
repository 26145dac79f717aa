"""Options of the command line, made of the fields of `EngineConfig` and `SamplingParams`: written once, there."""

import argparse
import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import Field, fields
from typing import Any, get_args

from nanovllm.config import EngineConfig
from nanovllm.sampling_params import SamplingParams

_NO_OPTIONS = ("logit_bias", "allowed_token_ids", "stop_token_ids")  # for rows, and for scripts


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and how the engine runs it."""
    help_text = "a checkpoint's folder, a .gguf file, or an id on the Hugging Face hub"
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help=help_text)
    _add_fields(parser.add_argument_group("engine"), EngineConfig, leave_out=("seed",))


def add_sampling_options(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """How requests are continued."""
    group = parser.add_argument_group("sampling")
    _add_fields(group, SamplingParams, leave_out=(*_NO_OPTIONS, *leave_out, "max_tokens"))
    help_text = "the largest number of tokens to generate (default: what max_model_len leaves)"
    group.add_argument("--max-tokens", type=int, default=argparse.SUPPRESS, metavar="N", help=help_text)


def add_template_option(parser: argparse.ArgumentParser) -> None:
    """Arguments of the chat template."""
    help_text = """passed on to the chat template, such as '{"enable_thinking": false}'"""
    parser.add_argument("--template-args", type=_json_object, default={}, metavar="JSON", help=help_text)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `EngineConfig` that were given."""
    return _given(args, EngineConfig, leave_out=("seed",))


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `SamplingParams` that were given."""
    return _given(args, SamplingParams, leave_out=())


def _given(args: argparse.Namespace, config: type, leave_out: tuple[str, ...]) -> dict[str, Any]:
    names = [field.name for field in fields(config) if field.name not in leave_out]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _add_fields(group: Any, config: type, leave_out: tuple[str, ...]) -> None:
    """An option for each field of a dataclass; what is not given is not there."""
    texts = _texts_of_fields(config)
    for field in fields(config):
        if field.name in leave_out:
            continue
        note = "" if field.default in (None, ()) else f" (default: {field.default})"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{texts[field.name]}{note}".replace("%", "%%"),
            **_how_to_read(field),
        )


def _how_to_read(field: Field[Any]) -> dict[str, Any]:
    kinds = {field.type, *get_args(field.type)}
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if Iterable[str] in kinds:
        return {"action": "append", "metavar": "TEXT"}
    if int in kinds:
        return {"type": int, "metavar": "N"}
    if float in kinds:
        return {"type": float, "metavar": "X"}
    return {"metavar": "NAME"}


def _texts_of_fields(config: type) -> dict[str, str]:
    """What the docstring of a class says of each of its arguments."""
    section = inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).rstrip(".") for name, text in found}


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"it must be a JSON object, got {text}")
    return value
