"""Top-k, top-p and min-p: edges, ties, exactness of the bounded pass, frequencies, and rows that do not meet."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.layers import sampler
from nanovllm.layers.random_numbers import uniform
from nanovllm.layers.sampler import Filters, Sampler

sample = Sampler()
pytestmark = pytest.mark.usefixtures("each_sampler")

SMALLEST, LARGEST = 0.0, 1 - 2.0**-24


def picks(
    probabilities: list[float] | Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, number: int = 512
) -> set[int]:
    """All tokens that can be picked from one row."""
    uniforms = torch.cat([torch.arange(number) / number, torch.tensor([LARGEST])])
    rows = len(uniforms)
    logits = torch.as_tensor(probabilities).float().log().expand(rows, -1)
    filters = Filters(torch.full((rows,), top_k), torch.full((rows,), top_p), torch.full((rows,), min_p))
    return set(sample(logits, torch.ones(rows), uniforms, filters).tolist())


def test_top_p_keeps_the_token_that_crosses_the_boundary() -> None:
    assert picks([0.1, 0.5, 0.15, 0.25], top_p=0.6) == {1, 3}
    assert picks([0.1, 0.5, 0.15, 0.25], top_p=0.8) == {1, 3, 2}


@pytest.mark.parametrize("top_p", [1e-30, 1e-6, 0.4])
def test_tiny_top_p_keeps_one(top_p: float) -> None:
    assert picks([0.1, 0.5, 0.15, 0.25], top_p=top_p) == {1}
    assert picks([0.25] * 4, top_p=1e-6) == {0}


def test_top_p_1_keeps_all() -> None:
    probabilities = torch.tensor([1.0, *[1e-7] * 4]).tolist()
    logits = torch.tensor(probabilities).log().expand(3, -1)
    filters = Filters(torch.tensor([4, 0, 4]), torch.ones(3), torch.zeros(3))
    assert sample(logits, torch.ones(3), torch.full((3,), LARGEST), filters).tolist() != [0, 0, 0]
    assert picks([0.25] * 4, top_p=1.0) == {0, 1, 2, 3}


def test_equals_of_the_kth_are_kept_and_of_those_at_top_p_the_lower() -> None:
    assert picks([0.1, 0.3, 0.1, 0.3, 0.1, 0.1], top_k=3) == {0, 1, 2, 3, 4, 5}
    assert picks([0.1, 0.3, 0.1, 0.3, 0.1, 0.1], top_k=2) == {1, 3}
    assert picks([0.1, 0.3, 0.1, 0.3, 0.1, 0.1], top_p=0.75) == {1, 3, 0, 2}


def test_top_k_larger_than_the_vocabulary_and_min_p_1() -> None:
    assert picks([0.4, 0.2, 0.4], top_k=10**6) == {0, 1, 2}
    assert picks([0.4, 0.2, 0.4], min_p=1.0) == {0, 2}
    assert picks([0.4, 0.2, 0.4], top_k=3, min_p=1.0) == {0, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [5, 100, 1000, 30_000])
def test_candidates_are_exact(vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # 16-bit logits have many equal values, at the boundaries too; rows from peaked to flat need few or all candidates.
    generator = torch.Generator().manual_seed(vocab_size)
    spread = torch.logspace(-2, 1.3, 96).unsqueeze(1)
    logits = (torch.randn(96, vocab_size, generator=generator) * spread).to(dtype)
    logits[:, ::7] = -math.inf
    top_k = torch.tensor([0, 1, 3, 50, 57, 200, 5000]).repeat(14)[:96]
    top_p = torch.rand(96, generator=generator)
    top_p[::5] = 1.0
    filters = Filters(top_k, top_p, torch.rand(96, generator=generator) * 0.1)
    temperatures, uniforms = torch.rand(96, generator=generator) + 0.3, torch.rand(96, generator=generator)
    tokens = sample(logits, temperatures, uniforms, filters)
    monkeypatch.setattr(sampler, "CANDIDATES", ())
    assert tokens.tolist() == sample(logits, temperatures, uniforms, filters).tolist()
    assert logits.gather(1, tokens.unsqueeze(1)).isfinite().all()


def test_few_candidates_are_looked_at_when_few_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    candidates = sampler._candidates
    monkeypatch.setattr(sampler, "_candidates", lambda logits, count: counts.append(count) or candidates(logits, count))
    logits = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:, 77] = 20.0
    filters = Filters(torch.tensor([50, 50, 0, 0]), torch.tensor([0.95, 1, 0.95, 0.5]), torch.zeros(4))
    Sampler()(logits, torch.ones(4), torch.rand(4), filters)
    assert set(counts) == {64}


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.05), (12, 1.0, 0.0), (0, 0.8, 0.0), (20, 0.9, 0.02)])
def test_frequencies(top_k: int, top_p: float, min_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "ROWS_IN_CACHE", 2**12)
    number, temperature = 20_000, 0.9
    logits = torch.randn(200, generator=torch.Generator().manual_seed(3)) * 1.5
    uniforms = torch.from_numpy(uniform(np.arange(number, dtype=np.uint64), np.full(number, 5, np.uint64)))
    filters = Filters(torch.full((number,), top_k), torch.full((number,), top_p), torch.full((number,), min_p))
    tokens = sample(logits.expand(number, -1), torch.full((number,), temperature), uniforms, filters)
    counts = tokens.bincount(minlength=200).double()
    # The definition, written down as plainly as can be.
    probabilities = (logits.double() / temperature).softmax(0)
    order = probabilities.argsort(descending=True)
    kept = order[: top_k or 200]
    share = probabilities[kept] / probabilities[kept].sum()
    kept = kept[share.cumsum(0) - share < top_p] if top_p < 1 else kept
    kept = kept[probabilities[kept] >= min_p * probabilities.max()]
    expected = probabilities[kept] / probabilities[kept].sum() * number
    assert counts.sum() == counts[kept].sum() == number
    rare = expected < 10
    if rare.any():  # lumped together, as Pearson's test asks for
        observed = torch.cat([counts[kept][~rare], counts[kept][rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    else:
        observed = counts[kept]
    degrees = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(100, 3001, generator=generator) * 2).to(dtype)
    logits[5] = math.nan
    temperatures = torch.rand(100, generator=generator) * 2
    temperatures[::4] = 0
    uniforms = torch.rand(100, generator=generator)
    top_k = torch.randint(0, 3, (100,), generator=generator) * torch.randint(1, 200, (100,), generator=generator)
    top_p = torch.rand(100, generator=generator) + 0.4
    top_p[top_p > 1] = 1
    min_p = torch.rand(100, generator=generator) * 0.1 * (torch.rand(100, generator=generator) < 0.5)

    def run(rows: Tensor) -> list[int]:
        filters = Filters(top_k[rows], top_p[rows], min_p[rows])
        return sample(logits[rows], temperatures[rows], uniforms[rows], filters).tolist()

    together = torch.tensor(run(torch.arange(100)))
    for size in (1, 2, 3, 7, 33):
        for rows in torch.randperm(100, generator=generator).split(size):
            assert run(rows) == together[rows].tolist()
