"""The tokenizer and the end-of-sequence tokens of a checkpoint, and the way from prompts and conversations to token ids."""

import itertools
import json
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; None when the folder has none, so that token ids in and out still work."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def load_eos_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Every token that ends a sequence: those of generation_config.json, else of config.json, and the tokenizer's."""
    token_ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if not token_ids and (folder / name).exists():
            token_ids |= _read_eos(folder / name)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        token_ids.add(tokenizer.eos_token_id)
    return frozenset(token_ids)


def _read_eos(file: Path) -> set[int]:
    try:
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a config: {error}") from error
    token_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) for token in token_ids):
        raise ValueError(f"{file}: eos_token_id must be a token id or a list of them, got {eos!r}")
    return set(token_ids)


def tokenize(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> list[list[int]]:
    """The token ids of prompts that are strings or token ids; the strings are tokenized in one call.

    A tokenizer that begins every text with a beginning-of-sequence token does not add a second one to a text that has it
    already, as the output of many chat templates does.

    Raises:
        TypeError, ValueError: a prompt that is neither, is empty, or has a token outside the vocabulary; with its index.
    """
    texts: dict[int, str] = {index: prompt for index, prompt in enumerate(prompts) if isinstance(prompt, str)}
    if texts and tokenizer is None:
        raise ValueError(f"prompt {next(iter(texts))} is text, but the checkpoint has no tokenizer: give token ids")
    encoded: dict[int, list[int]] = {}
    if texts and tokenizer is not None:
        _check_encodable(texts)
        encoded = dict(zip(texts, tokenizer(list(texts.values()))["input_ids"], strict=True))
        if tokenizer.bos_token is not None:
            for index, text in texts.items():
                if text.startswith(tokenizer.bos_token):
                    _drop_second_bos(encoded[index], text, tokenizer)
    result = []
    for index, prompt in enumerate(prompts):
        token_ids = encoded[index] if index in encoded else _check_types(index, prompt)
        if not token_ids:
            raise ValueError(f"prompt {index} is empty: it needs at least one token")
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise ValueError(f"prompt {index} has token {wrong}; the vocabulary is 0 to {vocab_size - 1}")
        result.append(token_ids)
    return result


def _check_encodable(texts: dict[int, str]) -> None:
    for index, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {index} is no valid text: {error}") from error


def _drop_second_bos(token_ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Drop the first token if it was added to those that `text` itself begins with."""
    bos: str = tokenizer.bos_token
    in_text = next(count for count in itertools.count() if not text.startswith(bos, count * len(bos)))
    in_ids = sum(1 for _ in itertools.takewhile(lambda token: token == tokenizer.bos_token_id, token_ids))
    if in_ids > in_text:
        del token_ids[0]


def _check_types(index: int, prompt: object) -> list[int]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes, bytearray)):
        raise TypeError(f"prompt {index} must be a str or a list of token ids, got {type(prompt).__name__}")
    if all(type(token) is int for token in prompt):
        return list(prompt)
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise TypeError(f"prompt {index} must be a str or a list of token ids, it holds {token!r}")
    return [int(token) for token in prompt]  # such as numpy's


def render_chats(
    conversations: Conversation | Sequence[Conversation], tokenizer: PreTrainedTokenizerBase | None, **template_args: Any
) -> list[list[int]]:
    """The token ids that the checkpoint's chat template makes of conversations, ready for the assistant's answer.

    Raises:
        TypeError: not a conversation.
        ValueError: no chat template, or it refuses a conversation; with its index.
    """
    if tokenizer is None or not tokenizer.chat_template:
        missing = "tokenizer" if tokenizer is None else "chat template"
        raise ValueError(f"the checkpoint has no {missing}: chat needs one. Use generate with prompts of your own")
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise TypeError(f"conversations must be lists of messages, got {type(conversations).__name__}")
    batch: Any = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
    options = {"add_generation_prompt": True, **template_args}
    texts: list[str] = []
    for index, conversation in enumerate(batch):
        if not isinstance(conversation, Sequence) or not all(isinstance(message, Mapping) for message in conversation):
            raise TypeError(f"conversation {index} must be a list of messages, dicts with 'role' and 'content'")
        try:
            texts.append(tokenizer.apply_chat_template(list(conversation), tokenize=False, **options))
        except Exception as error:  # whatever the template's code raises
            raise ValueError(f"the chat template refuses conversation {index}: {error}") from error
    # The template writes the special tokens itself.
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
