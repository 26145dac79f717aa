"""C++ for the small layers between the matrix products and for the sampler, on a CPU: cpu_layers.cpp and cpu_sampler.cpp.

They take the plain layers' places in a model, one by one, so that models and plain layers know nothing of them; the plain
layers remain what they are tested against. A GPU's counterpart is triton_layers.py.
"""

from typing import Any

from torch import Tensor, nn

from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import HeadNorms, RotaryEmbedding
from nanovllm.layers.sampler import Filters, Sampler
from nanovllm.utils.methods import replace_methods


def fuse_layers(model: nn.Module, kernels: Any) -> None:
    """Let the small layers of `model`, or a sampler, run as C++.

    Args:
        model: changed in place; other models are not. Its weights are on the CPU.
        kernels: what `load_kernels` returns.
    """

    def silu_and_mul(self: SiluAndMul, x: Tensor) -> Tensor:
        return kernels.silu_and_mul(x)

    def rms_norm(self: RMSNorm, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def add_rms_norm(self: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)

    def rotate(
        self: RotaryEmbedding, positions: Tensor, q: Tensor, k: Tensor, norms: HeadNorms | None = None
    ) -> tuple[Tensor, Tensor]:
        weights = [norm.weight for norm in norms] if norms is not None else [None, None]
        return kernels.rotate(positions, q, k, self.cos_sin, *weights, norms[0].eps if norms is not None else 0.0)

    def sample(
        self: Sampler, logits: Tensor, temperatures: Tensor, uniforms: Tensor, filters: Filters | None = None
    ) -> Tensor:
        return kernels.sample(logits, temperatures, uniforms, *(filters or (None, None, None)))

    replace_methods(model, Sampler, forward=sample)
    replace_methods(model, SiluAndMul, forward=silu_and_mul)
    replace_methods(model, RMSNorm, forward=rms_norm, add_and_norm=add_rms_norm)
    replace_methods(model, RotaryEmbedding, forward=rotate)
