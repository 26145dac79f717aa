"""The activation of gated MLPs."""

import torch.nn.functional as F
from torch import Tensor, nn


class SiluAndMul(nn.Module):
    """SwiGLU's activation (Shazeer 2020, "GLU Variants Improve Transformer"): silu(gate) * up."""

    def forward(self, x: Tensor) -> Tensor:
        """x: gate and up side by side, [num_tokens, 2 * size] -> [num_tokens, size]."""
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
