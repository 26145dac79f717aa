"""Products on a CPU: the kernels of cpu_linear.cpp, which explains them.

Weights and tables keep their dtype, in the kernels' layout: where they are narrower than what a model runs in, or the CPU
cannot multiply them, they are widened as they are used, and what comes out is what float32 weights would give. One layout
serves products and look-ups, so that a tied table is there once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.linear import ParallelLinear
from nanovllm.utils.device import PRODUCT_FLAGS
from nanovllm.utils.methods import replace_methods


def is_fastest(dtype: torch.dtype, flags: set[str]) -> bool:
    """Whether torch's libraries have no faster products of `dtype`, by instructions that these kernels do not use.

    Args:
        dtype: of the model.
        flags: the CPU's, see `cpu_flags`.
    """
    return not (PRODUCT_FLAGS.get(dtype, set()) - {"avx512_bf16", "amx_bf16"}) & flags


def use_packed_weights(model: nn.Module, kernels: Any, dtype: torch.dtype) -> Callable[[nn.Parameter], None]:
    """Let the linear layers, tables and heads of `model` run as C++ that takes and gives `dtype`.

    Args:
        model: changed in place; other models are not. Its weights are on the CPU, in any dtype.
        kernels: what `load_kernels` returns.
        dtype: float32, bfloat16 or float16.

    Returns:
        To be called with each parameter before the model runs, once it is filled: a weight is replaced by a packed copy.
    """
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for layer in model.modules():
        if isinstance(layer, (ParallelLinear, VocabParallelEmbedding)):
            owners.setdefault(layer.weight, []).append(layer)

    def pack(weight: nn.Parameter) -> None:
        layers = owners.pop(weight, [])
        packed = nn.Parameter(kernels.pack_weight(weight, dtype), requires_grad=False) if layers else weight
        for layer in layers:
            layer.weight = packed

    def multiply(self: ParallelLinear | ParallelLMHead, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return kernels.linear(x, self.weight, bias, self.output_size)

    def look_up(self: VocabParallelEmbedding, token_ids: Tensor) -> Tensor:
        return kernels.look_up(token_ids, self.weight, dtype)

    replace_methods(model, ParallelLinear, multiply=multiply)
    replace_methods(model, VocabParallelEmbedding, look_up=look_up)
    replace_methods(model, ParallelLMHead, multiply=multiply)
    return pack
