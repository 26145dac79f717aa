"""Layers that always work on the same number of rows, so that a row's result cannot depend on how many there are.

Libraries choose a kernel, and with it an order of summation, by the shape of their input: cuBLAS for products, torch for the
sums of a norm. Given one shape only, there is nothing to choose. Rows are padded to whole tiles and computed tile by tile;
what remains is that a kernel must treat the rows of a tile alike, as kernels whose tiles are no smaller do.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ParallelLinear
from nanovllm.layers.packed_weight import treats_rows_alike
from nanovllm.utils.device import cpu_flags
from nanovllm.utils.methods import replace_methods

ROWS = 64  # enough to be no slower than a few rows where weights are read from memory, few enough not to waste many


def fix_rows(model: nn.Module) -> None:
    """Let norms and products of `model`, changed in place, work on `ROWS` rows at a time.

    Most packed weights need it not: see packed_weight.py. Activation and rotation sum nothing.
    """
    flags = cpu_flags()
    for kind in {type(layer) for layer in model.modules() if isinstance(layer, (ParallelLinear, ParallelLMHead, RMSNorm))}:
        replace_methods(model, kind, forward=_by_tiles(kind.forward, flags))


def _by_tiles(forward: Callable[[Any, Tensor], Tensor], flags: set[str]) -> Callable[[Any, Tensor], Tensor]:
    """The same for x [num_rows, ...], computed tile by tile."""

    def forward_tiles(layer: nn.Module, x: Tensor) -> Tensor:
        weight = layer.weight
        if isinstance(weight, Tensor) and treats_rows_alike(weight, flags):
            return forward(layer, x)
        num_rows = len(x)
        padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, -num_rows % ROWS))
        return torch.cat([forward(layer, tile) for tile in padded.split(ROWS)])[:num_rows]

    return forward_tiles
