"""SamplingParams: how one request is continued. Validated once, then frozen."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real

MAX_SEED = 2**63 - 1
MAX_TEMPERATURE = 1e30  # beyond it float32, in which it is used, comes to its end


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is continued. The names are vLLM's.

    What happens to the logits, and in which order, is defined in `nanovllm.layers.logits_processors`.

    Args:
        temperature: divides the logits before the softmax; 0 takes the most likely token (greedy).
        max_tokens: the largest number of tokens to generate, at least 1.
        ignore_eos: go on after an end-of-sequence token, up to `max_tokens`.
        seed: the request's own source of randomness, 0 to 2**63 - 1. The number that picks output token i is a function
            of (seed, i) alone, so the same seed gives the same tokens alone or in any batch. None draws a fresh seed.
        top_k: sample among the k most likely tokens, and those as likely as the k-th; 0 or -1: among all.
        top_p: sample among the fewest most likely tokens whose probabilities reach top_p together; above 0, at most 1.
        min_p: only tokens at least min_p times as likely as the most likely one; 0 to 1.
        repetition_penalty: above 1 makes tokens of prompt and output less likely (Keskar et al. 2019, "CTRL").
        presence_penalty: subtracted from the logits of tokens that the output has; -2 to 2.
        frequency_penalty: subtracted once for each time that the output has the token; -2 to 2.
        logit_bias: token id -> what is added to its logit. Kept as pairs, ascending.
        allowed_token_ids: only these can be sampled.
        min_tokens: tokens to generate before an end-of-sequence token, `stop` or `stop_token_ids` may end it.
        stop: a string, or several, that end the output, which is cut before them.
        stop_token_ids: tokens that end the output, beside the checkpoint's end-of-sequence tokens; not in the text.
        include_stop_str_in_output: leave the stop string, or the text of the stop token, in the text.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: report the k most likely tokens at each output token, and the chosen one; 0 is the chosen one alone.
        prompt_logprobs: the same for each prompt token but the first.
        n: completions of the prompt, which share its KV blocks; needs a temperature above 0.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of its range.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    seed: int | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    allowed_token_ids: Iterable[int] | None = None
    min_tokens: int = 0
    stop: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value is not default:  # which is right, and what most have
                object.__setattr__(self, name, _CHECKS[name](name, value))
        check_int("min_tokens", self.min_tokens, minimum=0, maximum=self.max_tokens)
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n must be 1 at temperature 0, got {self.n}: greedy completions are all the same")


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int; raise unless it is an integer (numpy's too, not a bool) from `minimum` to `maximum`, included."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)  # type: ignore[call-overload]
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if maximum is not None and number > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")
    return number


def check_number(
    name: str,
    value: object,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    note: str = "",
) -> float:
    """`value`; raise unless it is a finite number from `minimum` to `maximum`, both included, and greater than `above`."""
    if type(value) not in (int, float) and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if math.isfinite(number) and minimum <= number <= maximum and number > above:
        return int(value) if isinstance(value, Integral) else value  # type: ignore[return-value]
    limits = [
        *([f"at least {minimum:g}"] if minimum > -math.inf else []),
        *([f"above {above:g}"] if above > -math.inf else []),
        *([f"at most {maximum:g}"] if maximum < math.inf else []),
    ]
    raise ValueError(f"{name} must be finite and {' and '.join(limits)}{note}, got {value!r}")


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _strings(name: str, value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(strings, Iterable) or isinstance(strings, bytes):
        raise TypeError(f"{name} must be a string or strings, got {value!r}")
    result = tuple(strings)
    for one in result:
        if not isinstance(one, str):
            raise TypeError(f"{name} must be a string or strings, it holds {one!r}")
        if not one:
            raise ValueError(f"{name} must not hold an empty string, got {value!r}")
    return result


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    token_ids = () if value is None else value
    if not isinstance(token_ids, Iterable) or isinstance(token_ids, (str, bytes)):
        raise TypeError(f"{name} must be token ids, got {value!r}")
    return tuple(dict.fromkeys(check_int(f"each of {name}", token, minimum=0) for token in token_ids))


def _allowed(name: str, value: object) -> tuple[int, ...]:
    token_ids = _token_ids(name, value)
    if not token_ids:
        raise ValueError(f"{name} must hold at least one token id, got none")
    return token_ids


def _biases(name: str, value: object) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else () if value is None else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
        raise TypeError(f"{name} must be a dict from token ids to numbers, got {value!r}")
    biases: dict[int, float] = {}
    for token, bias in pairs:
        check_int(f"each token id of {name}", token, minimum=0)
        check_number(f"{name} of token {token}", bias, minimum=-1e4, maximum=1e4)
        biases[int(token)] = float(bias)
    return tuple(sorted(biases.items()))


_DEFAULTS: dict[str, object] = {field.name: field.default for field in fields(SamplingParams)}
# What each field may be; a check returns it in a shape that cannot change, whatever the user gave, and still holds.
_CHECKS: dict[str, Callable[[str, object], object]] = {
    "temperature": partial(check_number, minimum=0, maximum=MAX_TEMPERATURE, note=" (0 is greedy)"),
    "max_tokens": partial(check_int, minimum=1),
    "ignore_eos": _flag,
    "seed": partial(check_int, minimum=0, maximum=MAX_SEED),
    "top_k": partial(check_int, minimum=-1),
    "top_p": partial(check_number, above=0, maximum=1),
    "min_p": partial(check_number, minimum=0, maximum=1),
    "repetition_penalty": partial(check_number, above=0),
    "presence_penalty": partial(check_number, minimum=-2, maximum=2),
    "frequency_penalty": partial(check_number, minimum=-2, maximum=2),
    "logit_bias": _biases,
    "allowed_token_ids": _allowed,
    "min_tokens": partial(check_int, minimum=0),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "include_stop_str_in_output": _flag,
    "skip_special_tokens": _flag,
    "logprobs": partial(check_int, minimum=0),
    "prompt_logprobs": partial(check_int, minimum=0),
    "n": partial(check_int, minimum=1),
}
