"""SamplingParams: every value is checked once, and refused with its name, what was given and the limit."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from nanovllm import SamplingParams
from nanovllm.sampling_params import MAX_SEED, check_int


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.ignore_eos, params.seed) == (1.0, 64, False, None)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 1e-300},
        {"temperature": np.float32(0.5)},
        {"temperature": np.int64(2)},
        {"temperature": Fraction(1, 3)},
        {"max_tokens": 1},
        {"max_tokens": 10**9},
        {"ignore_eos": True},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"seed": None},
    ],
    ids=str,
)
def test_values_at_the_limits_are_taken(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    for name, value in values.items():
        assert getattr(params, name) == value


@pytest.mark.parametrize("integer", [np.int8, np.int32, np.int64, np.uint8, np.uint64])
def test_numpy_integers_are_taken(integer: type[np.integer[Any]]) -> None:
    params = SamplingParams(max_tokens=integer(5), seed=integer(7))
    assert (params.max_tokens, params.seed) == (5, 7)
    assert params == SamplingParams(max_tokens=5, seed=7)
    assert type(params.max_tokens) is type(params.seed) is int  # NumPy's own overflow in sums with a prompt's length


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", -1, "at least 0"),
        ("temperature", math.nan, "finite"),
        ("temperature", math.inf, "finite"),
        ("temperature", -math.inf, "finite"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -5, "at least 1"),
        ("max_tokens", np.int64(-1), "at least 1"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, f"at most {MAX_SEED}"),
        ("seed", np.uint64(2**63), f"at most {MAX_SEED}"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_limit(name: str, value: Any, limit: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*{limit}") as error:
        SamplingParams(**{name: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", "0.5", "a number"),
        ("temperature", None, "a number"),
        ("temperature", True, "a number"),
        ("temperature", 1j, "a number"),
        ("temperature", [1.0], "a number"),
        ("max_tokens", 1.0, "an integer"),
        ("max_tokens", "16", "an integer"),
        ("max_tokens", True, "an integer"),
        ("max_tokens", None, "an integer"),
        ("max_tokens", np.float64(4), "an integer"),
        ("ignore_eos", 1, "True or False"),
        ("ignore_eos", "yes", "True or False"),
        ("ignore_eos", None, "True or False"),
        ("seed", 0.5, "an integer"),
        ("seed", False, "an integer"),
        ("seed", "0", "an integer"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be {wanted}, got ") as error:
        SamplingParams(**{name: value})
    assert repr(value) in str(error.value)


def test_unknown_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["temperature", "max_tokens", "ignore_eos", "seed"])
def test_params_are_frozen(name: str) -> None:
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(params, name, 1)
    assert params == SamplingParams()


def test_replace_checks_again() -> None:
    params = SamplingParams(temperature=0.5, seed=3)
    assert dataclasses.replace(params, max_tokens=2) == SamplingParams(temperature=0.5, seed=3, max_tokens=2)
    with pytest.raises(ValueError, match="max_tokens"):
        dataclasses.replace(params, max_tokens=0)


def test_equal_params_are_equal_keys() -> None:
    assert len({SamplingParams(seed=1), SamplingParams(seed=1), SamplingParams(seed=2)}) == 2


@pytest.mark.parametrize(("value", "message"), [(2, "n must be at least 3, got 2"), (8, "n must be at most 7, got 8")])
def test_check_int_names_value_and_limit(value: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_int("n", value, minimum=3, maximum=7)


@pytest.mark.parametrize("value", [3, 7])
def test_check_int_includes_its_limits(value: int) -> None:
    check_int("n", value, minimum=3, maximum=7)
    check_int("n", value, minimum=3)
