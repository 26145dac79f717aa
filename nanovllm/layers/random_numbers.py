"""The random numbers of the sampler: the one that picks output token i of a request depends on its seed and i alone.

SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), started at a mixed seed. All
arrays are of one element a request: it runs in every step, and the GPU waits.
"""

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.uint64]

STEP = np.uint64(0x9E3779B97F4A7C15)  # from a state to the next
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _40 = map(np.uint64, (27, 30, 31, 40))
_UNIT = np.float32(2.0**-24)


def start_states(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> States:
    """The states from which the number at each position is made; a `STEP` further lies that of the next position."""
    mixed = _mix(seeds + STEP)
    return (mixed ^ (mixed >> _31)) + (positions + np.uint64(1)) * STEP


def uniform_of(states: States) -> NDArray[np.float32]:
    """A number in [0, 1), a multiple of 2**-24, for each state. SplitMix64's last mixing leaves the upper 33 bits alone."""
    return (_mix(states) >> _40).astype(np.float32) * _UNIT


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float32]:
    """The numbers of (seed, position)."""
    return uniform_of(start_states(seeds, positions))


def _mix(states: States) -> States:
    z = states >> _30
    z ^= states
    z *= _FIRST
    z ^= z >> _27
    z *= _SECOND
    return z
