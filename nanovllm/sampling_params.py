"""SamplingParams: how one request is continued. Validated once, then frozen."""

from dataclasses import dataclass
from numbers import Integral, Real

MAX_SEED = 2**63 - 1
MAX_TEMPERATURE = 1e30  # beyond it float32, in which it is used, comes to its end


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is continued.

    Args:
        temperature: divides the logits before the softmax; 0 takes the most likely token (greedy).
        max_tokens: the largest number of tokens to generate, at least 1.
        ignore_eos: go on after an end-of-sequence token, up to `max_tokens`.
        seed: the request's own source of randomness, 0 to 2**63 - 1. The number that picks output token i is a function
            of (seed, i) alone, so the same seed gives the same tokens alone or in any batch. None draws a fresh seed.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of its range.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, Real):
            raise TypeError(f"temperature must be a number, got {self.temperature!r}")
        if not 0 <= self.temperature <= MAX_TEMPERATURE:  # NaN fails every comparison
            limits = f"finite, at least 0 (greedy) and at most {MAX_TEMPERATURE:g}"
            raise ValueError(f"temperature must be {limits}, got {self.temperature!r}")
        object.__setattr__(self, "max_tokens", check_int("max_tokens", self.max_tokens, minimum=1))
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        if self.seed is not None:
            object.__setattr__(self, "seed", check_int("seed", self.seed, minimum=0, maximum=MAX_SEED))


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int; raise unless it is an integer (numpy's too, not a bool) from `minimum` to `maximum`, included."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if maximum is not None and number > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")
    return number
