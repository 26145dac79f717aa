"""Rotary position embedding (Su et al. 2021, "RoFormer") and the ways checkpoints stretch it to longer contexts."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.layers.layernorm import RMSNorm

DEVICE = "cpu"  # tables are computed here even while parameters are made on the meta device


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become angles.

    kind: "default", "linear", "llama3" or "yarn".
    theta: the base of the geometric series of wavelengths.
    scaling: the options of `kind` under the names of Hugging Face's config.json.
    max_position_embeddings: positions that the checkpoint's config promises.
    """

    kind: str
    theta: float
    scaling: dict[str, Any]
    max_position_embeddings: int

    @property
    def original_max_positions(self) -> int:
        """Positions that the model was trained for before it was stretched."""
        return self.scaling.get("original_max_position_embeddings") or self.max_position_embeddings

    @property
    def factor(self) -> float:
        """By how much the context was stretched."""
        factor = self.scaling.get("factor")
        return self.max_position_embeddings / self.original_max_positions if factor is None else factor

    @property
    def max_positions(self) -> int:
        """Positions that the model can be used for."""
        if self.kind == "linear":
            return int(self.max_position_embeddings * self.factor)
        if self.kind == "yarn":
            return max(self.max_position_embeddings, int(self.original_max_positions * self.factor))
        return self.max_position_embeddings


def _plain_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=DEVICE).float() / head_dim
    return 1.0 / config.theta**exponents


def _linear_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Position interpolation (Chen et al. 2023): every wavelength grows by the factor."""
    return _plain_frequencies(config, head_dim) / config.factor


def _llama3_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Llama 3.1: long wavelengths grow by the factor, short ones stay, those between are blended."""
    frequencies = _plain_frequencies(config, head_dim)
    low, high = config.scaling["low_freq_factor"], config.scaling["high_freq_factor"]
    turns = config.original_max_positions * frequencies / (2 * math.pi)  # over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / config.factor)


def _yarn_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023): as Llama 3.1's, with a ramp over dimensions instead of over wavelengths."""
    options = config.scaling

    def dimension_that_turns(turns: float) -> float:
        wavelength = config.original_max_positions / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.theta))

    low = dimension_that_turns(options.get("beta_fast") or 32)
    high = dimension_that_turns(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0  # no division by 0
    dims = torch.arange(head_dim // 2, dtype=torch.float32, device=DEVICE)
    interpolate = ((dims - low) / (high - low)).clamp(0, 1)
    frequencies = _plain_frequencies(config, head_dim)
    return frequencies * (1 - interpolate) + frequencies / config.factor * interpolate


def _yarn_magnitude(config: RopeConfig) -> float:
    """YaRN's temperature of attention, as a factor on cos and sin."""
    options = config.scaling
    if options.get("attention_factor") is not None:
        return options["attention_factor"]

    def magnitude(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    if options.get("mscale") and options.get("mscale_all_dim"):
        return magnitude(options["mscale"]) / magnitude(options["mscale_all_dim"])
    return magnitude(1.0)


_FREQUENCIES = {
    "default": _plain_frequencies,
    "linear": _linear_frequencies,
    "llama3": _llama3_frequencies,
    "yarn": _yarn_frequencies,
}
ROPE_KINDS = frozenset(_FREQUENCIES)

HeadNorms = tuple[RMSNorm, RMSNorm]  # of q, of k


class RotaryEmbedding(nn.Module):
    """Rotates the two halves of each head by angles that grow with the position.

    Args:
        config: how positions become angles.
        head_dim: size of a head, all of which is rotated.
        num_positions: positions to make the table for.
    """

    cos_sin: Tensor

    def __init__(self, config: RopeConfig, head_dim: int, num_positions: int) -> None:
        super().__init__()
        positions = torch.arange(num_positions, dtype=torch.float32, device=DEVICE)
        angles = torch.outer(positions, _FREQUENCIES[config.kind](config, head_dim))
        magnitude = _yarn_magnitude(config) if config.kind == "yarn" else 1.0
        # float32 [num_positions, 1, head_dim]: cos, then sin; the 1 is for the heads
        table = torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(magnitude).unsqueeze(1)
        self.register_buffer("cos_sin", table, persistent=False)

    def forward(self, positions: Tensor, q: Tensor, k: Tensor, norms: HeadNorms | None = None) -> tuple[Tensor, Tensor]:
        """Rotate q [num_tokens, num_heads, head_dim] and k [num_tokens, num_kv_heads, head_dim].

        positions: int64 [num_tokens].
        norms: of each head of q and of k, before the rotation; here, since a GPU does both at once.
        """
        if norms is not None:
            q, k = norms[0](q), norms[1](k)
        cos, sin = self.cos_sin[positions].chunk(2, dim=-1)
        rotate = partial(_rotate, cos=cos, sin=sin)
        return rotate(q), rotate(k)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
