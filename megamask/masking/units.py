"""In which pieces a pack is masked: single tokens, whole words, or spans of words.

A unit gives each token the number of its piece, from 0 in reading order. A piece never crosses from one sequence into
another. A token that cannot be masked is a piece of its own; inside a word, as [UNK] may be, it does not end the word.

The host finds the pieces, because it must know how many there are before it draws their random numbers. Costs about
0.1 ms of one core for 8192 tokens, and one copy to the device that nobody waits for; nothing for single tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from megamask.batch import HostPack, PackedBatch
from megamask.masking.rng import PackRng, send
from megamask.masking.settings import Unit as Unit


@dataclass(frozen=True)
class Pieces:
    """The number of the piece that each token belongs to, how many pieces there are, and the tokens of the largest."""

    numbers: Int64[Tensor, " T"]
    count: int
    largest: int

    @classmethod
    def of(cls, numbers: Int64[Tensor, " T"]) -> Pieces:
        """Pieces with these ``numbers``. Waits for the device."""
        sizes = torch.bincount(numbers)
        return cls(numbers, len(sizes), int(sizes.max()))


def pieces_of_unit(unit: Unit, batch: PackedBatch, rng: PackRng) -> Pieces:
    """The pieces of ``batch``; draws from ``rng`` only for spans."""
    device = batch.tokens.device
    if unit == "token":
        return Pieces(torch.arange(batch.layout.rows, device=device), batch.layout.rows, 1)
    host = batch.on_host
    starts = host.starts_word | host.begins
    numbers = _numbers(_span_starts(starts, host, rng) if unit == "span" else starts, host.maskable)
    sizes = np.bincount(numbers)
    return Pieces(send([torch.from_numpy(numbers)], device)[0], len(sizes), int(sizes.max()))


def _numbers(starts: Bool[np.ndarray, " T"], maskable: Bool[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
    """The pieces of the words or spans that begin at ``starts``."""
    rows = np.flatnonzero(maskable)
    group = starts.cumsum()[rows]
    # the first maskable token of each word or span gives its number to all of its maskable tokens
    is_first = np.diff(group, prepend=0) > 0
    begins = ~maskable
    begins[rows[is_first]] = True
    numbers = begins.cumsum(dtype=np.int64) - 1
    numbers[rows] = numbers[rows[is_first]][is_first.cumsum() - 1]
    return numbers


def _span_starts(words: Bool[np.ndarray, " T"], host: HostPack, rng: PackRng) -> Bool[np.ndarray, " T"]:
    """Join neighbouring words to spans of a random number of words; a word without a maskable token is apart.

    Source: SpanBERT (Joshi et al. 2020, section 3.1): lengths in words, geometric with p = 0.2, at most 10 (mean
    3.8). Differs: there spans are drawn one by one and may meet; here the text is tiled with spans, of which the
    score then chooses, so every score and an exact budget work with spans as with words.
    """
    count = int(np.count_nonzero(words))
    maskable = np.zeros(count, dtype=bool)
    maskable[words.cumsum()[host.maskable] - 1] = True
    apart = ~maskable
    apart[1:] |= ~maskable[:-1]  # and the word behind it begins a span
    chances = 0.8 ** np.arange(10)
    ends = np.searchsorted(np.cumsum(chances / chances.sum()), rng.uniform_array(count))
    first = np.zeros(count, dtype=bool)
    first[np.cumsum(np.minimum(ends, 9) + 1)[:-1].clip(max=count - 1)] = True
    starts = np.zeros_like(words)
    starts[words] = first | apart | host.begins[words]
    return starts
