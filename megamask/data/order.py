"""The order of an epoch: a permutation of range(n) that is computed, not stored.

A Feistel network is a bijection of 2^(2k) numbers. Applying it until the result is below n makes it a bijection of
range(n) (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It needs O(1)
memory, any place is computed directly, and the key is (seed, epoch). A number takes about a microsecond in Python and
less than 0.3 in numpy. The order is well mixed but not cryptographically secure.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int64

ROUNDS = 6
_WORD = 2**64 - 1


class Permutation:
    """A bijection of range(``size``) for each (``seed``, ``epoch``); any integers are good seeds."""

    def __init__(self, size: int, *, seed: int, epoch: int):
        assert size > 0
        self.size = size
        # half of the bits of a number, at least one
        self.half = max(1, ((size - 1).bit_length() + 1) // 2)
        self.keys = [
            int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {turn}".encode(), digest_size=8).digest(), "little")
            for turn in range(ROUNDS)
        ]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        """The number at ``place``, in range(size)."""
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} of a permutation of {self.size}")
        number = self._mix(int(place), int)
        while number >= self.size:
            number = self._mix(number, int)
        return number

    def many(self, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The numbers at all ``places``: the same as ``self[place]`` for each."""
        assert len(places) == 0 or (places.min() >= 0 and places.max() < self.size)
        numbers = self._mix(places.astype(np.uint64), np.uint64)
        while len(outside := np.flatnonzero(numbers >= self.size)):
            numbers[outside] = self._mix(numbers[outside], np.uint64)
        return numbers.astype(np.int64)

    def _mix(self, numbers, word: type):
        """The Feistel network on Python integers or arrays of uint64; ``word`` is the type of its constants."""
        shift, mask = word(self.half), word((1 << self.half) - 1)
        left, right = numbers >> shift, numbers & mask
        for key in self.keys:
            left, right = right, left ^ (_scramble(right, key, word) & mask)
        return (left << shift) | right


def _scramble(numbers, key: int, word: type):
    """The finaliser of MurmurHash3 (Appleby, public domain) after the key is added."""
    x = (numbers + word(key)) & word(_WORD)
    x = ((x ^ (x >> word(33))) * word(0xFF51AFD7ED558CCD)) & word(_WORD)
    x = ((x ^ (x >> word(33))) * word(0xC4CEB9FE1A85EC53)) & word(_WORD)
    return x ^ (x >> word(33))
