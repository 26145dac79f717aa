"""SamplingParams: how one request is continued. Validated once, then frozen."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real

MAX_SEED = 2**63 - 1
_PLAIN = frozenset((int, float, bool, str, tuple, type(None)))
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
        check_number("temperature", self.temperature, minimum=0, maximum=MAX_TEMPERATURE, note=" (0 is greedy)")
        check_number("top_p", self.top_p, above=0, maximum=1)
        check_number("min_p", self.min_p, minimum=0, maximum=1)
        check_number("repetition_penalty", self.repetition_penalty, above=0)
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name), minimum=-2, maximum=2)
        check_int("max_tokens", self.max_tokens, minimum=1)
        check_int("min_tokens", self.min_tokens, minimum=0, maximum=self.max_tokens)
        check_int("top_k", self.top_k, minimum=-1)
        check_int("n", self.n, minimum=1)
        for name, maximum in (("seed", MAX_SEED), ("logprobs", None), ("prompt_logprobs", None)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), minimum=0, maximum=maximum)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n must be 1 at temperature 0, got {self.n}: greedy completions are all the same")
        self._freeze()

    def _freeze(self) -> None:
        """Replace what the user may have given in several shapes, and still hold, by one that cannot change."""
        values: dict[str, object] = {}
        for name, freeze in (("stop", _strings), ("stop_token_ids", _token_ids), ("logit_bias", _biases)):
            value = getattr(self, name)
            if type(value) is not tuple or value:  # else it is the default
                values[name] = freeze(name, () if value is None else value)
        if self.allowed_token_ids is not None:
            values["allowed_token_ids"] = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not values["allowed_token_ids"]:
                raise ValueError("allowed_token_ids must hold at least one token id, got none")
        for name in self.__slots__:
            value = getattr(self, name)
            if type(value) not in _PLAIN and isinstance(value, Integral):
                values[name] = int(value)  # NumPy's would overflow in sums with a prompt's length
        for name, frozen in values.items():
            object.__setattr__(self, name, frozen)


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
) -> None:
    """Raise unless `value` is a finite number from `minimum` to `maximum`, both included, and greater than `above`."""
    if type(value) not in (int, float) and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if math.isfinite(number) and minimum <= number <= maximum and number > above:
        return
    limits = [
        *([f"at least {minimum:g}"] if minimum > -math.inf else []),
        *([f"above {above:g}"] if above > -math.inf else []),
        *([f"at most {maximum:g}"] if maximum < math.inf else []),
    ]
    raise ValueError(f"{name} must be finite and {' and '.join(limits)}{note}, got {value!r}")


def _strings(name: str, value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
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
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be token ids, got {value!r}")
    result = tuple(value)
    for token in result:
        check_int(f"each of {name}", token, minimum=0)
    return tuple(dict.fromkeys(int(token) for token in result))


def _biases(name: str, value: object) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
        raise TypeError(f"{name} must be a dict from token ids to numbers, got {value!r}")
    biases: dict[int, float] = {}
    for token, bias in pairs:
        check_int(f"each token id of {name}", token, minimum=0)
        check_number(f"{name} of token {token}", bias, minimum=-1e4, maximum=1e4)
        biases[int(token)] = float(bias)
    return tuple(sorted(biases.items()))
