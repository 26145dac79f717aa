"""Products in float32 on a CPU: the kernels of cpu_linear.cpp, which explains them.

Weights and tables stay in the checkpoint's dtype, in the kernels' layout, and are widened as they are used: what comes out
is what float32 weights would give. One layout serves products and look-ups, so that a tied table is there once.
"""

from typing import Any

from torch import Tensor, nn

from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.linear import ParallelLinear
from nanovllm.utils.methods import replace_methods


def use_packed_weights(model: nn.Module, kernels: Any) -> None:
    """Let the linear layers, tables and heads of `model` run as C++ that takes float32 and gives float32.

    Args:
        model: changed in place; other models are not. Its weights are on the CPU, in any dtype; they are used up.
        kernels: what `load_kernels` returns.
    """
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for layer in model.modules():
        if isinstance(layer, (ParallelLinear, VocabParallelEmbedding)):
            owners.setdefault(layer.weight, []).append(layer)
    while owners:
        weight, layers = owners.popitem()
        packed = nn.Parameter(kernels.pack_weight_(weight), requires_grad=False)
        for layer in layers:
            layer.weight = packed

    def multiply(self: ParallelLinear | ParallelLMHead, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return kernels.linear(x, self.weight, bias, self.output_size)

    def look_up(self: VocabParallelEmbedding, token_ids: Tensor) -> Tensor:
        return kernels.look_up(token_ids, self.weight)

    replace_methods(model, ParallelLinear, multiply=multiply)
    replace_methods(model, VocabParallelEmbedding, look_up=look_up)
    replace_methods(model, ParallelLMHead, multiply=multiply)
