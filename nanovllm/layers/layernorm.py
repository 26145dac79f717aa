"""RMSNorm (Zhang and Sennrich 2019), alone or together with the residual addition before it."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, in float32, and scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)

    def add_and_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `x + residual`, and the sum: the next residual. Neither argument is changed."""
        residual = x + residual
        return self(residual), residual
