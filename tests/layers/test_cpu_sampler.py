"""The sampler in C++: the tokens that the numbers pick, as exactly as float32 can tell, whatever rows are beside them."""

from typing import Any

import pytest
import torch
from cpu_builds import FLAGS
from torch import Tensor

from nanovllm.layers.cpu_layers import fuse_layers
from nanovllm.layers.sampler import Filters, Sampler
from nanovllm.utils.cpu_build import load_library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCAB_SIZES = [1, 2, 31, 127, 128, 129, 1000, 50_257]


@pytest.fixture(scope="module", params=FLAGS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    result = Sampler()
    fuse_layers(result, load_library(FLAGS[request.param]))
    return result


def draw(num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits from flat to peaked, temperatures of which some are 0, and numbers."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-1, 1.2, num_rows).unsqueeze(1)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * spread).to(dtype)
    logits[:, 1::5] = float("-inf")
    temperatures = torch.rand(num_rows, generator=generator) * 1.5 + 0.2
    temperatures[::4] = 0
    return logits, temperatures, torch.rand(num_rows, generator=generator)


def assert_picked(
    tokens: Tensor, logits: Tensor, temperatures: Tensor, uniforms: Tensor, min_p: Tensor | None = None
) -> None:
    """The numbers fall into the tokens' parts of the cumulative sum.

    But for rounding: a weight has a relative error of 2 units of float32 in the exponential and of |x| / 2 of them in its
    argument x (and is e^x), a group's sum one of 16 at most: together below 20 * 2**-23 of the total.
    """
    scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperatures.double().clamp(min=1e-30).unsqueeze(1)
    weights = scaled.exp()
    if min_p is not None:
        weights[weights < min_p.unsqueeze(1)] = 0
    sums = weights.cumsum(-1)
    target, total = uniforms.double() * sums[:, -1], sums[:, -1]
    above = sums.gather(1, tokens.unsqueeze(1)).squeeze(1)
    below = above - weights.gather(1, tokens.unsqueeze(1)).squeeze(1)
    near = 20 * 2**-23 * total
    sampled = temperatures > 0
    assert ((below - near <= target) & (target <= above + near))[sampled].all()
    assert (weights.gather(1, tokens.unsqueeze(1)).squeeze(1) > 0).all()
    assert torch.equal(tokens[~sampled], logits.float().argmax(-1)[~sampled])


@pytest.mark.usefixtures("one_thread_and_three")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_numbers_pick(sampler: Sampler, dtype: torch.dtype) -> None:
    for seed, vocab_size in enumerate(VOCAB_SIZES):
        how = draw(40, vocab_size, dtype, seed)
        assert_picked(sampler(*how), *how)
        assert_picked(Sampler()(*how), *how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_min_p(sampler: Sampler, dtype: torch.dtype) -> None:
    logits, temperatures, uniforms = draw(40, 1000, dtype, seed=1)
    min_p = torch.rand(40, generator=torch.Generator().manual_seed(2)) * 0.3
    filters = Filters(torch.zeros(40, dtype=torch.int64), torch.ones(40), min_p)
    tokens = sampler(logits, temperatures, uniforms, filters)
    assert_picked(tokens, logits, temperatures, uniforms, min_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [5, 129, 1000, 50_257])
def test_filters(sampler: Sampler, vocab_size: int, dtype: torch.dtype) -> None:
    # 16-bit logits have many equal values, at the boundaries too; from flat to peaked, rows need all candidates or few.
    logits, temperatures, uniforms = draw(120, vocab_size, dtype, seed=vocab_size)
    generator = torch.Generator().manual_seed(6)
    top_k = torch.tensor([0, 1, 3, 50, 5000, 10**9])[torch.randint(0, 6, (120,), generator=generator)]
    top_p = torch.where(top_k == 3, 1.0, torch.rand(120, generator=generator))
    min_p = torch.where(torch.rand(120, generator=generator) < 0.5, 0.0, 0.1)
    filters = Filters(top_k, top_p, min_p)
    tokens, plain = (one(logits, temperatures, uniforms, filters).unsqueeze(1) for one in (sampler, Sampler()))
    ranks = logits.float().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    assert ((ranks.gather(1, tokens) - ranks.gather(1, plain)).abs() <= 1).all()  # a number may be next to a boundary
    assert (tokens == plain).float().mean() > 0.9


@pytest.mark.usefixtures("one_thread_and_three")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(sampler: Sampler, dtype: torch.dtype) -> None:
    logits, temperatures, uniforms = draw(64, 500, dtype, seed=3)
    logits[5, 7] = float("nan")
    generator = torch.Generator().manual_seed(4)
    top_k = torch.randint(0, 3, (64,), generator=generator) * 10  # a third is not filtered by it
    top_p = torch.where(torch.rand(64, generator=generator) < 0.5, 0.8, 1.0)
    filters = Filters(top_k, top_p, torch.zeros(64))
    together = sampler(logits, temperatures, uniforms, filters)
    assert together[5] == -1
    for row in range(64):
        one = slice(row, row + 1)
        alone = sampler(logits[one], temperatures[one], uniforms[one], Filters(*(values[one] for values in filters)))
        assert torch.equal(alone, together[one])
        if top_k[row] == 0 and top_p[row] == 1:
            assert torch.equal(sampler(logits[one], temperatures[one], uniforms[one]), together[one])


def test_rows_may_lie_apart(sampler: Sampler) -> None:
    logits, temperatures, uniforms = draw(12, 300, torch.float32, seed=5)
    apart = torch.cat([logits, torch.full((12, 50), 1e9)], dim=1)[:, :300]
    assert torch.equal(sampler(apart, temperatures, uniforms), sampler(logits, temperatures, uniforms))
    assert sampler(logits[:0], temperatures[:0], uniforms[:0]).tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 4, dtype=torch.float64)}, "no sampler for Double"),
        ({"logits": torch.zeros(4, 3).t()}, "must lie together"),
        ({"logits": torch.zeros(3, 0)}, "must lie together"),
        ({"temperatures": torch.ones(2)}, "expected one value for each row"),
        ({"uniforms": torch.ones(3, dtype=torch.float64)}, "expected scalar type Float"),
        ({"top_k": torch.ones(3)}, "expected scalar type Long"),
        ({"top_p": torch.ones(3, 1)}, "expected one value for each row"),
        ({"min_p": torch.ones(6)[::2]}, "expected one value for each row"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    ones = torch.ones(3)
    right = {"logits": torch.zeros(3, 4), "temperatures": ones, "uniforms": ones / 2}
    kernel, none = load_library(FLAGS["native"]).sample, dict.fromkeys(("top_k", "top_p", "min_p"))
    assert kernel(**right, **none).tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match=message):
        kernel(**{**right, **none, **change})
