"""Packed weights multiply as plain ones do, the same for any number of rows, and replace what they were made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.packed_weight import can_pack, linear, pack_weights
from nanovllm.utils.ranks import Ranks


def make_model(dtype: torch.dtype, bias: bool) -> nn.ModuleDict:
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict(
        {
            "table": VocabParallelEmbedding(100, 48, Ranks()),
            "up": ColumnParallelLinear(48, {"gate": 96, "up": 64}, bias, Ranks()),
            "down": RowParallelLinear(160, 48, bias, Ranks()),
            "head": ParallelLMHead(100, 48, Ranks()),
        }
    )
    model["head"].weight = model["table"].weight
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_products_are_those_of_plain_weights(dtype: torch.dtype, bias: bool) -> None:
    plain, packed = make_model(dtype, bias), make_model(dtype, bias)
    pack_weights(packed)
    for name in ("up", "down", "head"):
        x = torch.randn(37, plain[name].weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        # Sums of up to 160 products in float32, rounded once to the dtype: an eps of the sum of their magnitudes.
        scale = F.linear(x.abs().float(), plain[name].weight.abs().float()).max().item()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(packed[name](x), plain[name](x), rtol=eps, atol=scale * 160 * 2**-24)


def test_float32_weights_are_packed_and_the_originals_freed() -> None:
    model = make_model(torch.float32, bias=True)
    assert can_pack(model["up"].weight), "the tests run on x86-64"
    table = model["table"].weight
    pack_weights(model)
    assert all(model[name].weight.is_mkldnn for name in ("up", "down", "head"))
    assert model["table"].weight is table
    assert not table.is_mkldnn, "a lookup needs the plain table"
    assert sum(p.numel() for p in model.parameters() if not p.is_mkldnn) == table.numel() + 160 + 48  # biases
    pack_weights(model)  # nothing more to do


def test_a_row_is_the_same_for_any_number_of_rows() -> None:
    model = make_model(torch.float32, bias=False)
    pack_weights(model)
    weight = model["up"].weight
    x = torch.randn(70, 48, generator=torch.Generator().manual_seed(2))
    together = linear(x, weight)
    for num_rows in range(1, 70):
        torch.testing.assert_close(linear(x[:num_rows], weight), together[:num_rows], rtol=0, atol=0)
        torch.testing.assert_close(linear(x[-num_rows:], weight), together[-num_rows:], rtol=0, atol=0)


@pytest.mark.parametrize(("supported", "expected"), [(True, True), (False, False)])
def test_bfloat16_is_packed_where_the_cpu_multiplies_it(
    supported: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    assert can_pack(torch.empty(16, 16, dtype=torch.bfloat16)) is expected
    assert not can_pack(torch.empty(16, 16, dtype=torch.float16))
