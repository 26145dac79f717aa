"""The small layers in other forms against the plain ones; for those in C++ and those in Triton."""

from collections.abc import Callable

import torch
from torch import Tensor

from nanovllm.layers.layernorm import RMSNorm


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """From a seed, wide enough that rounding shows."""
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def norm_ulps(dtype: torch.dtype, size: int) -> int:
    """By how much two norms may differ, in units in the last place.

    The sum of n squares in float32 has a relative error below n/8 eps in eight lanes, the plain one as well, and what comes
    after adds a few. In 16 bits that moves a value over a rounding boundary now and then: by one unit before it is
    multiplied with the weight, which can be two behind it.
    """
    return 4 + size // 16 if dtype == torch.float32 else 2


def check_norms(
    norm: RMSNorm, plain: RMSNorm, num_rows: int, dtype: torch.dtype, assert_near: Callable[[Tensor, Tensor, int], None]
) -> None:
    """A norm alone and behind a sum; its arguments stay as they were."""
    size = len(plain.weight)
    x, residual = randn(num_rows, size, dtype=dtype), randn(num_rows, size, dtype=dtype, seed=2)
    before = x.clone(), residual.clone()
    assert_near(norm(x), plain(x), norm_ulps(dtype, size))
    normed, total = norm.add_and_norm(x, residual)
    assert torch.equal(total, plain.add_and_norm(x, residual)[1])
    assert_near(normed, plain(total), norm_ulps(dtype, size))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
