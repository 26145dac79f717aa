"""The sampler: one token for each row of logits.

The number that picks output token i of a request is a function of the request's seed and i alone (`uniform`), so what a
request gets does not depend on what else is in its batch. It picks the token by the inverse of the cumulative sum of the
probabilities: one number a row, instead of one for each word of the vocabulary.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float32]:
    """A number in [0, 1), a multiple of 2**-24, for each (seed, position).

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") started at a mixed seed.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + _GOLDEN) + (positions + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> Tensor:
    """One token id a row.

    Args:
        logits: [num_rows, vocab_size].
        temperatures: float32 [num_rows]; rows with 0 take their largest logit, the first of equals.
        uniforms: float32 [num_rows] in [0, 1); rows with temperature 0 do not use theirs.

    Returns:
        int64 [num_rows]; -1 for a row whose logits have no largest finite value: NaN or plus infinity among them, or
        nothing but minus infinity.
    """
    largest, token_ids = logits.max(dim=-1)  # NaN if there is one
    random = temperatures > 0
    if random.any():
        token_ids[random] = _sample_random(logits[random], largest[random], temperatures[random], uniforms[random])
    return token_ids.where(largest.isfinite(), -1)


def _sample_random(logits: Tensor, largest: Tensor, temperatures: Tensor, uniforms: Tensor) -> Tensor:
    # Subtract before dividing: with the tiniest of temperatures the largest is still exp(0) = 1, the others 0.
    scaled = (logits.float() - largest.float().unsqueeze(-1)) / temperatures.unsqueeze(-1)
    cumulative = scaled.exp_().cumsum(dim=-1)
    total = cumulative[:, -1]
    # Rounding must not lift the target to the total: the first sum above it is then always a token of some probability.
    target = torch.minimum(uniforms * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)
