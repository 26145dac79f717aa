"""Weights of linear layers in the layout that oneDNN multiplies fastest on this CPU, where cpu_linear.py is not used.

`F.linear` brings a weight into that layout at every call. Packed once, the product is up to twice as fast for the few rows
of a decode step, and each row's result is the same, bit for bit, whatever the number of rows (plain float32 products of 1
to 3 rows differ), unless the CPU has AMX.
"""

import platform
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@runtime_checkable
class Packable(Protocol):
    """A layer whose weight is used in products only."""

    def pack(self) -> None:
        """Replace the weight by a packed one, where that is possible."""


def pack_weights(model: nn.Module) -> None:
    """Pack every layer that can be packed, one after the other, once the weights are loaded."""
    for layer in model.modules():
        if isinstance(layer, Packable):
            layer.pack()


def pack_weight(layer: nn.Module) -> None:
    """Replace `layer.weight` by a packed copy, where oneDNN has fast products of its dtype; else change nothing.

    The original is freed, unless it is shared: the table of a tied embedding stays, for looking up, beside the packed head.
    """
    weight = layer.get_parameter("weight")
    if not weight.is_mkldnn and can_pack(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        layer.register_parameter("weight", nn.Parameter(packed, requires_grad=False))


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN packs it on this machine: float32, or bfloat16 where the CPU has instructions for it."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def treats_rows_alike(weight: Tensor, flags: set[str]) -> bool:
    """Whether a row's product is known to be the same, bit for bit, whatever the number of rows.

    Args:
        weight: packed or not.
        flags: the CPU's, see `cpu_flags`. With AMX, logits in bfloat16 were seen to depend on batch or threads.
    """
    in_our_layout = weight.dim() == 4  # of cpu_linear.cpp
    return in_our_layout or (weight.is_mkldnn and not (weight.dtype == torch.bfloat16 and "amx_bf16" in flags))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [num_rows, input_size] times weight [output_size, input_size], packed or not, -> [num_rows, output_size]."""
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
