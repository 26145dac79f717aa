"""The products in C++ against exact ones, on all builds of cpu_builds.py."""

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_builds import EMULATED, FLAGS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanovllm import LLM, SamplingParams
from nanovllm.layers.cpu_linear import is_fastest, use_packed_weights
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.utils.cpu_build import load_library
from nanovllm.utils.ranks import Ranks

BUILDS = FLAGS | EMULATED
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (of the activations and of what comes out, of the weight)
PAIRS = [*((torch.float32, dtype) for dtype in DTYPES), *((dtype, dtype) for dtype in DTYPES[1:])]
# (input_size, output_size): less than a panel, whole panels, some and a rest; one depth, two, some and a rest; odd sizes.
SHAPES = [(1, 1), (2, 3), (3, 16), (300, 50), (256, 64), (576, 33), (1030, 96)]
NUM_ROWS = [0, 1, 2, 5, 6, 7, 12, 13, 24, 31, 192, 193, 400]  # tiles of any height, and blocks


@pytest.fixture(scope="module", params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> Any:
    return load_library(BUILDS[request.param])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pack(kernels: Any, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return kernels.pack_weight(weight, dtype)


def multiply(kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return kernels.linear(x, pack(kernels, weight, x.dtype), bias, len(weight))


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(kernels: Any, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    input_size, output_size = shape
    dtype = dtypes[0]
    weight, bias = randn(output_size, input_size, dtype=dtypes[1]), randn(output_size, dtype=dtype, seed=1)
    for num_rows in NUM_ROWS:
        for added in (None, bias):
            x = randn(num_rows, input_size, dtype=dtype, seed=2)
            exact = x.double() @ weight.double().T + (0 if added is None else added.double())
            result = multiply(kernels, x, weight, added)
            assert (result.dtype, result.shape) == (dtype, exact.shape)
            # Each of the n additions to a sum rounds it once, and each product where there is no fused multiply-add; then
            # the sum is rounded to the dtype, to the nearest.
            magnitude = x.double().abs() @ weight.double().abs().T + (0 if added is None else added.double().abs())
            tolerance = 2 * (input_size + 1) * 2**-24 * magnitude
            if dtype != torch.float32:
                tolerance += (exact.abs() + tolerance) * torch.finfo(dtype).eps / 2
            assert ((result - exact).abs() <= tolerance).all(), (num_rows, added is None)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("output_size", [2, 64, 100, 192, 8192])  # the last: rows of the result would compete in the caches
def test_gated_products_give_to_the_bit_what_product_and_activation_give(
    kernels: Any, output_size: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    weight, bias = randn(output_size, 64, dtype=dtypes[1]), randn(output_size, dtype=dtypes[0], seed=1)
    packed = pack(kernels, weight, dtypes[0])
    for num_rows in NUM_ROWS if output_size < 1000 else [1, 33, 400]:
        for added in (None, bias):
            x = randn(num_rows, 64, dtype=dtypes[0], seed=2)
            expected = kernels.silu_and_mul(kernels.linear(x, packed, added, output_size))
            result = kernels.gated_linear(x, packed, added, output_size)
            assert torch.equal(result, expected), (num_rows, added is None)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_a_row_is_the_same_among_any_others_on_any_number_of_threads(
    kernels: Any, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    weight, bias = randn(100, 600, dtype=dtypes[1]), randn(100, dtype=dtypes[0], seed=1)
    x = randn(400, 600, dtype=dtypes[0], seed=2)
    torch.set_num_threads(1)
    alone = torch.cat([multiply(kernels, row, weight, bias) for row in x.split(1)])
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        for num_rows in NUM_ROWS:
            assert torch.equal(multiply(kernels, x[:num_rows], weight, bias), alone[:num_rows])
            assert torch.equal(multiply(kernels, x[400 - num_rows :], weight, bias), alone[400 - num_rows :])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrow_weights_give_to_the_bit_what_the_same_in_float32_give(kernels: Any, dtype: torch.dtype) -> None:
    weight = randn(80, 300, dtype=dtype)
    for num_rows in NUM_ROWS:
        x = randn(num_rows, 300, seed=1)
        assert torch.equal(multiply(kernels, x, weight), multiply(kernels, x, weight.float()))


@pytest.mark.parametrize("output_size", [1024, 1040])
def test_a_product_that_is_larger_than_the_caches(kernels: Any, output_size: int) -> None:
    weight, x = randn(output_size, 64, dtype=torch.bfloat16), randn(1100, 64, dtype=torch.bfloat16, seed=1)
    alone = torch.cat([multiply(kernels, part, weight) for part in x.split(100)])
    assert torch.equal(multiply(kernels, x, weight), alone)


def test_what_is_not_finite_stays_where_it_is(kernels: Any) -> None:
    x, weight = randn(20, 300), randn(40, 300, seed=1)
    expected = multiply(kernels, x, weight)
    x[3], weight[7] = torch.nan, torch.inf
    result = multiply(kernels, x, weight)
    assert result[3].isnan().all()
    assert not result[:, 7].isfinite().any()
    others, outputs = torch.arange(20) != 3, torch.arange(40) != 7
    assert torch.equal(result[others][:, outputs], expected[others][:, outputs])


def test_rows_that_are_apart_in_memory(kernels: Any) -> None:
    wide, weight = randn(9, 500), randn(32, 200, seed=1)
    assert torch.equal(multiply(kernels, wide[:, 100:300], weight), multiply(kernels, wide[:, 100:300].clone(), weight))


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_look_up(kernels: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, stored = dtypes
    for input_size in (70, 71):
        table = randn(101, input_size, dtype=stored)
        packed, token_ids = pack(kernels, table, dtype), torch.randint(101, (200,))
        for size in (0, 1, 200):
            assert torch.equal(kernels.look_up(token_ids[:size], packed, dtype), table[token_ids[:size]].to(dtype))
        with pytest.raises(IndexError, match="token -1 is not in the table"):
            kernels.look_up(torch.tensor([5, -1]), packed, dtype)
        beyond = packed.shape[0] * packed.shape[2]
        with pytest.raises(IndexError, match=f"token {beyond} is not in the table"):
            kernels.look_up(torch.tensor([beyond]), packed, dtype)


def test_what_does_not_fit_is_refused(kernels: Any) -> None:
    packed, bias = pack(kernels, randn(64, 32)), randn(64)
    for x, added, output_size, message in (
        (randn(2, 33), None, 64, "a packed weight .* does not fit an input"),
        (randn(2, 32), None, 100, "a packed weight .* does not fit an input"),
        (randn(2, 32).double(), None, 64, "no product of Double"),
        (randn(32), None, 64, r"expected \[num_rows, input_size\]"),
        (randn(2, 32), bias.bfloat16(), 64, "expected scalar type Float"),
        (randn(2, 32), bias[:63], 64, "the bias does not fit 64 outputs"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.linear(x, packed, added, output_size)
    for other in (randn(64, 32), packed[0], packed[..., :1, :], packed.expand(-1, -1, -1, 3)):
        with pytest.raises(RuntimeError, match="not a packed weight"):
            kernels.linear(randn(2, 32), other, None, 64)
        with pytest.raises(RuntimeError, match="not a packed weight"):
            kernels.look_up(torch.tensor([5]), other, torch.float32)
    with pytest.raises(RuntimeError, match="gate and up differ in size: together they have 63 outputs"):
        kernels.gated_linear(randn(2, 32), packed, None, 63)
    with pytest.raises(RuntimeError, match="no product with weights of"):
        pack(kernels, randn(64, 32).double())
    with pytest.raises(RuntimeError, match="expected a contiguous weight"):
        pack(kernels, randn(64, 32).T)


def test_activations_of_another_dtype_than_a_weight_of_pairs_was_packed_for_are_refused() -> None:
    kernels = load_library(EMULATED["bf16_dot"])
    packed = pack(kernels, randn(64, 32, dtype=torch.bfloat16), torch.bfloat16)
    with pytest.raises(RuntimeError, match="packed for bfloat16, not Float"):
        kernels.linear(randn(2, 32), packed, None, 64)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (set(), {"float32": True, "bfloat16": True, "float16": True}),
        ({"avx512_bf16"}, {"float32": True, "bfloat16": True, "float16": True}),
        ({"avx512_bf16", "amx_bf16", "avx512_fp16"}, {"float32": True, "bfloat16": True, "float16": False}),
        ({"bf16", "asimdhp"}, {"float32": True, "bfloat16": False, "float16": False}),
    ],
)
def test_torch_multiplies_where_it_has_faster_instructions(flags: set[str], expected: dict[str, bool]) -> None:
    assert {name: is_fastest(getattr(torch, name), flags) for name in expected} == expected


def make_layers(dtype: torch.dtype) -> nn.ModuleDict:
    layers: dict[str, Any] = {
        "table": VocabParallelEmbedding(100, 64, Ranks()),
        "up": ColumnParallelLinear(64, {"gate": 96, "up": 64}, True, Ranks()),
        "down": RowParallelLinear(160, 64, True, Ranks()),
        "head": ParallelLMHead(100, 64, Ranks()),
    }
    layers["head"].weight = layers["table"].weight
    for index, parameter in enumerate(nn.ModuleDict(layers).parameters()):
        parameter.requires_grad_(False).copy_(randn(*parameter.shape, seed=index))
    return nn.ModuleDict(layers).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_layers_give_what_plain_ones_give_and_a_tied_table_is_there_once(kernels: Any, dtype: torch.dtype) -> None:
    plain, packed = make_layers(dtype), make_layers(dtype)
    originals = [weakref.ref(layer.weight) for layer in packed.values()]
    pack = use_packed_weights(packed, kernels, dtype)
    for parameter in [*packed.parameters()]:
        pack(parameter)
    del parameter
    gc.collect()
    assert [original() for original in originals] == [None] * 4
    assert packed["head"].weight is packed["table"].weight
    token_ids = torch.arange(100)
    assert torch.equal(packed["table"](token_ids), plain["table"](token_ids))
    for name, input_size in (("up", 64), ("down", 160), ("head", 64)):
        x = randn(37, input_size, dtype=dtype, seed=9)
        rtol = 0 if dtype == torch.float32 else torch.finfo(dtype).eps  # both may be rounded
        torch.testing.assert_close(packed[name](x), plain[name](x), rtol=rtol, atol=160 * 2**-24 * 160)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_model_in_float32_keeps_the_weights_of_its_checkpoint(
    checkpoint: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    """And answers as one whose checkpoint holds the same values in float32."""
    outputs = []
    for stored in (dtype, torch.float32):
        folder = shutil.copytree(checkpoint(tie_word_embeddings=True), tmp_path / str(stored))
        tensors = load_file(folder / "model.safetensors")
        save_file({name: tensor.to(dtype).to(stored) for name, tensor in tensors.items()}, folder / "model.safetensors")
        llm = LLM(folder, dtype="float32", device="cpu", num_kvcache_blocks=20)
        runner = llm.executor._runner
        assert {parameter.dtype for parameter in runner.model.parameters() if parameter.dim() > 1} == {stored}
        assert {parameter.dtype for parameter in runner.model.parameters() if parameter.dim() == 1} == {torch.float32}
        params = SamplingParams(temperature=0, max_tokens=20, logprobs=3)
        (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
        outputs.append((output["token_ids"], output["logprobs"]))
    assert outputs[0] == outputs[1]
