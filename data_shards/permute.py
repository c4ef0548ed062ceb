"""Random orders as pure functions of a few integers.

Fisher and Yates' shuffle on the numbers of SplitMix64 (Steele et al., 2014), in numba: numpy's
generators take longer to be made and to shuffle than the rows take to be read.
"""

import numba
import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def permute(values: np.ndarray, *key: int) -> None:
    """Permute `values` [n] in place, n below 2**32; the order depends on n and the key alone.

    `key` are integers of 0 or more; each of them, and its place, matters.
    """
    _permute(values, np.array(key, np.uint64))


@numba.njit(cache=True, nogil=True)
def _permute(values: np.ndarray, key: np.ndarray) -> None:
    state = np.uint64(0)
    for part in key:
        state = _mixed(state + _GAMMA) ^ part
    state = _mixed(state + _GAMMA)
    for i in range(len(values) - 1, 0, -1):
        state += _GAMMA
        # of 32 random bits a number up to i, uneven by at most (i + 1) / 2**32
        bits = _mixed(state) >> np.uint64(32)
        j = np.int64((bits * np.uint64(i + 1)) >> np.uint64(32))
        values[i], values[j] = values[j], values[i]


@numba.njit(cache=True, nogil=True)
def _mixed(z: np.uint64) -> np.uint64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
