"""In which pieces a pack is masked: single tokens, whole words, or spans of words.

A unit gives each token the number of its piece, from 0 in reading order. A piece never crosses from one sequence into
another. A token that cannot be masked is a piece of its own; inside a word, as [UNK] may be, it does not end the word.

The host finds the pieces, because it must know how many there are before it draws their random numbers. Costs about
0.1 ms of one core for 8192 tokens, and one copy to the device that nobody waits for; nothing for single tokens.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int64

from megamask.batch import HostPack, PackedBatch
from megamask.masking.piece_order import PieceTable
from megamask.masking.rng import PackRng
from megamask.masking.settings import Unit as Unit


def pieces_of_unit(unit: Unit, batch: PackedBatch, rng: PackRng) -> PieceTable:
    """The pieces of ``batch``; draws from ``rng`` only for spans."""
    if unit == "token":
        return PieceTable.of_tokens(batch)
    host = batch.on_host
    starts = host.starts_word | host.begins
    return PieceTable.of(_numbers(_span_starts(starts, host, rng) if unit == "span" else starts, host.maskable), batch)


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
