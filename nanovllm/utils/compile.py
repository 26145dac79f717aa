"""torch.compile for the small layers between the matrix products and the sampler, where there is a GPU to gain from it.

Norm, activation, rotation and the weighing of tokens are chains of elementwise operations; compiled, each reads and writes
memory once. All sizes are dynamic from the first call, so that no number of tokens makes them compile again; only a size of
1 is a case of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.layers.sampler import Sampler
from nanovllm.utils.methods import replace_methods

METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    SiluAndMul: ("forward",),
    RMSNorm: ("forward", "add_and_norm"),
    RotaryEmbedding: ("forward",),
    Sampler: ("pick_largest", "pick_any"),
}


def compile_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the layers of `model` in `METHODS`. All layers of a kind share what is compiled, at their first calls.

    Args:
        model: changed in place, itself or the layers in it; other models are not.
        backend: torch.compile's.
    """
    for kind, names in METHODS.items():
        compiled = {name: torch.compile(getattr(kind, name), backend=backend, dynamic=True) for name in names}
        replace_methods(model, kind, **compiled)
