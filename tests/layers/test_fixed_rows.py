"""Layers on a fixed number of rows: the same values, and the same bits for any number of rows."""

from unittest.mock import Mock

import pytest
import torch

from nanovllm.layers import fixed_rows
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.fixed_rows import ROWS, fix_rows
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.utils.ranks import Ranks


def make_model() -> torch.nn.ModuleDict:
    layers = {
        "qkv": ColumnParallelLinear(576, {"q": 320, "k": 64}, True, Ranks()),
        "down": RowParallelLinear(576, 192, False, Ranks()),
        "head": ParallelLMHead(500, 576, Ranks()),
        "norm": RMSNorm(576, 1e-5),
    }
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ModuleDict(layers).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", ["qkv", "down", "head", "norm"])
@torch.inference_mode()
def test_any_number_of_rows(name: str) -> None:
    plain, fixed = make_model()[name], make_model()
    fix_rows(fixed)
    layer, x = fixed[name], torch.randn(3 * ROWS + 5, 576, generator=torch.Generator().manual_seed(1))
    together = layer(x)
    torch.testing.assert_close(together, plain(x), rtol=1e-4, atol=1e-4)
    for num_rows in (0, 1, 2, 3, 5, 7, ROWS, ROWS + 1, 2 * ROWS):
        assert torch.equal(layer(x[:num_rows]), together[:num_rows])
        assert torch.equal(layer(x[len(x) - num_rows :]), together[len(x) - num_rows :])


@torch.inference_mode()
def test_norms_of_heads_and_of_sums() -> None:
    plain, fixed = make_model()["norm"], make_model()
    fix_rows(fixed)
    x, residual = torch.randn(2, 70, 576, generator=torch.Generator().manual_seed(2))
    for result, expected in zip(fixed["norm"].add_and_norm(x, residual), plain.add_and_norm(x, residual), strict=True):
        torch.testing.assert_close(result, expected)
    heads = x.unflatten(0, (35, 2))
    torch.testing.assert_close(fixed["norm"](heads), plain(heads))


@pytest.mark.parametrize(("flags", "expected"), [({"avx512_bf16"}, [1, 100]), ({"amx_bf16"}, [ROWS, ROWS])])
def test_packed_products_need_it_with_amx(monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: list[int]) -> None:
    monkeypatch.setattr(fixed_rows, "cpu_flags", lambda: flags)
    numbers = []

    class Layer(RowParallelLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            numbers.append(len(x))
            return x

    layer = Layer(576, 192, False, Ranks())
    packed = Mock(spec=torch.Tensor, is_mkldnn=True, dtype=torch.bfloat16)
    packed.dim.return_value = 2
    fix_rows(layer)
    del layer.weight
    object.__setattr__(layer, "weight", packed)
    for num_rows in (1, 100):
        layer(torch.zeros(num_rows, 576))
    assert [numbers[0], numbers[-1]] == expected


def test_plain_products_need_it() -> None:
    layer, x = make_model()["down"], torch.randn(100, 576, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(layer(x[:1]), layer(x)[:1])
