"""Integer and content hashes that never change with a library's version.

Shuffles and hold-out choices are part of a run's definition, so they rest on splitmix64 and BLAKE2b rather than on a
random generator whose stream may change from one numpy release to the next.
"""

from __future__ import annotations

import hashlib

import numpy as np

MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def mix_int(value: int) -> int:
    """splitmix64's output function for one Python integer (taken modulo 2^64)."""
    z = (value + _GAMMA) & MASK64
    z = ((z ^ (z >> 30)) * _MIX1) & MASK64
    z = ((z ^ (z >> 27)) * _MIX2) & MASK64
    return z ^ (z >> 31)


def mix_array(values: np.ndarray) -> np.ndarray:
    """Apply `mix_int` to every element: uint64[n] to uint64[n]. Array arithmetic wraps silently, as wanted here."""
    z = values.astype(np.uint64) + np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    return z ^ (z >> np.uint64(31))


def salt_of(*parts: int) -> int:
    """One 64-bit salt from several integers, order mattering."""
    salt = 0
    for part in parts:
        salt = mix_int(salt ^ mix_int(part & MASK64))
    return salt


def shuffled(ids: np.ndarray, *salt_parts: int) -> np.ndarray:
    """Shuffle `ids` (int64[n]) deterministically: in the order of the hash of (id, salt_parts).

    The position of one id relative to another depends on those two ids and the salt alone.
    """
    keys = mix_array(mix_array(ids) ^ np.uint64(salt_of(*salt_parts)))
    return ids[np.argsort(keys, kind="stable")]


def permuted(i: int, n: int, salt: int) -> int:
    """Place of i in a permutation of 0..n-1: the deterministic shuffle of rows, without a table of them.

    Four Feistel rounds over just enough bits, walked until the value falls below n (four steps at most on average), so
    a trillion rows cost no more memory than ten.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(4):
            left, right = right, left ^ (mix_int(salt ^ (right << 3 | turn)) & mask)
        i = left << half | right
        if i < n:
            return i


def content_hash(data: bytes) -> int:
    """64-bit hash of a document's bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
