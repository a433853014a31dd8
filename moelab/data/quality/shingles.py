"""Runs of n words as 64-bit numbers, many at once.

A word w has a hash h(w); the run w_0 .. w_{n-1} has sum_j h(w_j) B^j mod 2^64 with an odd B, mixed once more. With
prefix sums S of h(w_k) B^k, the run at i is (S_{i+n} - S_i) B^{-i}: B is odd, so it has an inverse.
"""

from __future__ import annotations

import functools
import hashlib
import re

import numpy as np

WORD = re.compile(r"\w+")
BASE = 0x9E3779B97F4A7C15  # odd: 2^64 / golden ratio
_INVERSE = pow(BASE, -1, 1 << 64)


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=4)
def _powers(base: int, length: int) -> np.ndarray:
    factors = np.full(length + 1, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def hashes(text: str, n: int) -> np.ndarray:
    """Returns a uint64 for each run of n words of a text, in order; lower case, punctuation left out.

    A text of fewer words is one run. The same runs have the same number everywhere.

    >>> a, b = hashes("one two three four", 3), hashes("Zero, one two three.", 3)
    >>> len(a), bool(a[0] == b[1]), bool(a[1] == b[0])
    (2, True, False)
    """
    words = WORD.findall(text.lower())
    count = len(words)
    if not count:
        return np.zeros(0, np.uint64)
    n = min(n, count)
    size = 1 << max(12, count.bit_length())
    power, inverse = _powers(BASE, size), _powers(_INVERSE, size)
    word_W = np.fromiter(map(_word_hash, words), np.uint64, count)
    prefix = np.zeros(count + 1, np.uint64)
    np.cumsum(word_W * power[:count], out=prefix[1:])
    run = (prefix[n:] - prefix[: count - n + 1]) * inverse[: count - n + 1]
    run ^= run >> np.uint64(32)
    return (run * np.uint64(0xD6E8FEB86659FD93)) ^ (run >> np.uint64(29))
