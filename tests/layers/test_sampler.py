"""The sampler: the numbers, and the tokens that they pick."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.layers import random_numbers
from nanovllm.layers.random_numbers import uniform
from nanovllm.layers.sampler import Sampler
from nanovllm.sampling_params import MAX_SEED

sample = Sampler()
pytestmark = pytest.mark.usefixtures("each_sampler")

LARGEST_UNIFORM = 1 - 2.0**-24
INF = math.inf


def draw(seeds: list[int], positions: list[int]) -> NDArray[np.float32]:
    return uniform(np.array(seeds, np.uint64), np.array(positions, np.uint64))


def sample_with(logits: Tensor, temperature: float, uniforms: list[float] | Tensor) -> list[int]:
    """The token that each of the numbers picks from one row of logits."""
    uniforms = torch.as_tensor(uniforms, dtype=torch.float32)
    rows = logits.expand(len(uniforms), -1)
    tokens: list[int] = sample(rows, torch.full((len(uniforms),), temperature), uniforms).tolist()
    return tokens


def chi_square_is_plausible(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> bool:
    """Pearson's test at about five standard deviations; every expected count must be above about 5."""
    expected = probabilities * counts.sum()
    assert expected.min() > 5
    degrees = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return degrees - 5 * math.sqrt(2 * degrees) < statistic < degrees + 5 * math.sqrt(2 * degrees)


# ---- the numbers ----


def splitmix64(state: int) -> int:
    """The output function of Steele, Lea and Flood, in Python's own integers."""
    mask = 2**64 - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32, MAX_SEED, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 1, 4095, 2**31])
def test_uniform_is_splitmix64(seed: int, position: int) -> None:
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    state = splitmix64(seed + golden & mask) + (position + 1) * golden & mask
    assert draw([seed], [position])[0] == (splitmix64(state) >> 40) / 2**24


@pytest.mark.parametrize("mixed", [0, 2**64 - 1])
def test_uniform_is_at_least_0_and_below_1(mixed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_numbers, "_mix", lambda z: np.full_like(z, mixed))
    numbers = draw([0], [0])
    assert numbers.dtype == np.float32
    assert numbers[0] == (LARGEST_UNIFORM if mixed else 0)


def test_uniform_is_a_function_of_seed_and_position_alone() -> None:
    seeds, positions = [5, 6, 5, MAX_SEED], [0, 0, 1, 7]
    together = draw(seeds, positions)
    assert together.tolist() == draw(seeds, positions).tolist()
    assert together.tolist() == [draw([s], [p])[0] for s, p in zip(seeds, positions, strict=True)]


def test_uniform_differs_with_seed_and_with_position() -> None:
    seeds, positions = (grid.ravel().tolist() for grid in np.meshgrid(np.arange(32), np.arange(32)))
    # 1024 of 2**24 numbers: a coincidence among them has probability 0.03, and this grid is fixed.
    assert len(set(draw(seeds, positions).tolist())) == 1024


@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_uniform_is_uniform_and_without_correlation(axis: str) -> None:
    count, zeros = list(range(2**16)), [0] * 2**16
    numbers = draw(count, zeros) if axis == "seeds" else draw(zeros, count)
    counts = np.bincount((numbers * 64).astype(np.int64), minlength=64)
    assert chi_square_is_plausible(counts, np.full(64, 1 / 64))
    correlation = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(numbers))


def test_uniform_of_nothing() -> None:
    assert len(draw([], [])) == 0


# ---- greedy ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_temperature_0_takes_the_largest_and_the_first_of_equals(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1, 3, 2, 3], [-5, -9, -INF, -9], [0, 0, 0, 0]], dtype=dtype)
    assert sample(logits, torch.zeros(3), torch.full((3,), 0.99)).tolist() == [1, 0, 0]


# ---- temperature ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-38, 1e-44])
def test_tiny_temperatures_are_greedy(temperature: float, dtype: torch.dtype) -> None:
    # Dividing before subtracting the largest overflows here: infinity, then NaN.
    logits = torch.tensor([-300.0, 250.0, 251.0, -INF, 12.0], dtype=dtype)
    assert sample_with(logits, temperature, [0, 0.3, 0.5, LARGEST_UNIFORM]) == [2] * 4
    assert sample_with(-logits[:3], temperature, [0, LARGEST_UNIFORM]) == [0, 0]


def test_tiny_temperature_chooses_among_equals() -> None:
    logits = torch.tensor([7.0, 8.0, 8.0, 1.0])
    assert sample_with(logits, 1e-30, [0, 0.49, 0.51, LARGEST_UNIFORM]) == [1, 1, 2, 2]


@pytest.mark.parametrize("temperature", [1e30, 3e38])
def test_huge_temperatures_are_uniform_over_what_is_possible(temperature: float) -> None:
    logits = torch.tensor([-INF, 50.0, -20.0, -INF, 0.0, 7.0, -INF])
    uniforms = torch.arange(4) / 4 + 0.125
    assert sample_with(logits, temperature, uniforms) == [1, 2, 4, 5]


# ---- logits that are no distribution ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0, 1e30])
def test_unsound_rows_give_minus_1_and_leave_the_others_alone(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.tensor(
        [
            [0.0, 9.0, 0.0],
            [math.nan, 0.0, 9.0],
            [0.0, 9.0, math.nan],
            [math.nan] * 3,
            [0.0, INF, 9.0],
            [INF, -INF, math.nan],
            [-INF] * 3,
            [-INF, -INF, -9.0],
        ],
        dtype=dtype,
    )
    uniforms = torch.full((8,), 0.5)
    assert sample(logits, torch.full((8,), temperature), uniforms).tolist() == [1, -1, -1, -1, -1, -1, -1, 2]


# ---- what the numbers pick ----


@pytest.mark.parametrize("number", [0.0, 2.0**-24, 0.25, 0.5, 0.999, LARGEST_UNIFORM])
@pytest.mark.parametrize("vocab_size", [4, 1000, 151936])
@pytest.mark.parametrize("spread", [0.0, 3.0, 30.0])
def test_never_picks_a_token_of_probability_0(number: float, vocab_size: int, spread: float) -> None:
    # Rounding in the cumulative sum, or in its product with the number, must not reach the impossible tokens at the
    # ends or between others.
    logits = spread * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    logits[: vocab_size // 4] = -INF
    logits[vocab_size // 2 - 1] = -INF
    logits[-(vocab_size // 4) :] = -INF
    (token,) = sample_with(logits, 1.0, [number])
    assert 0 <= token < vocab_size
    assert logits[token] > -INF


def test_picks_only_possible_tokens_when_but_one_is() -> None:
    for possible in range(5):
        logits = torch.full((5,), -INF)
        logits[possible] = -1e4
        assert sample_with(logits, 1.0, [0, 0.5, LARGEST_UNIFORM]) == [possible] * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    num_draws = 100_000
    uniforms = torch.from_numpy(draw(list(range(num_draws)), [3] * num_draws))
    counts = np.bincount(sample_with(logits, temperature, uniforms), minlength=40)
    assert chi_square_is_plausible(counts, (logits.double() / temperature).softmax(0).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, 500, generator=generator).to(dtype)
    logits[5] = math.nan
    temperatures = torch.rand(64, generator=generator) * 2
    temperatures[::4] = 0
    uniforms = torch.from_numpy(draw(list(range(64)), [0] * 64))
    together = sample(logits, temperatures, uniforms)
    order = torch.randperm(64, generator=generator)
    assert torch.equal(sample(logits[order], temperatures[order], uniforms[order]), together[order])
    for row in range(64):
        one = slice(row, row + 1)
        assert torch.equal(sample(logits[one], temperatures[one], uniforms[one]), together[one])


def test_sample_leaves_its_arguments_as_they_are() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(3))
    temperatures, uniforms = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.1, 0.5, 0.9])
    before = [x.clone() for x in (logits, temperatures, uniforms)]
    sample(logits, temperatures, uniforms)
    assert all(torch.equal(x, y) for x, y in zip((logits, temperatures, uniforms), before, strict=True))
