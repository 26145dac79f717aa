"""The sampler: one token for each row of logits.

The number that picks output token i of a request is a function of the request's seed and i alone (`uniform`), so what a
request gets does not depend on what else is in its batch. It picks the token by the inverse of the cumulative sum of the
probabilities: one number a row, instead of one for each word of the vocabulary.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_27, _30, _31, _40 = map(np.uint64, (27, 30, 31, 40))
_UNIT = np.float32(2.0**-24)


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float32]:
    """A number in [0, 1), a multiple of 2**-24, for each (seed, position).

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") started at a mixed seed.
    """
    return uniform_of(start_stream(seeds), positions)


def start_stream(seeds: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """The mixed seeds: what of `uniform` is the same at every position."""
    return _mix(np.atleast_1d(seeds) + _GOLDEN)


def uniform_of(streams: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float32]:
    """`uniform` of the seeds that the streams were started with."""
    return (_mix(streams + (positions + np.uint64(1)) * _GOLDEN) >> _40).astype(np.float32) * _UNIT


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer, in place: it runs in every step, and the GPU waits."""
    z ^= z >> _30
    z *= _FIRST
    z ^= z >> _27
    z *= _SECOND
    z ^= z >> _31
    return z


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
