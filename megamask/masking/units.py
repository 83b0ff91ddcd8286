"""In which pieces a pack is masked: single tokens, whole words, or spans of words.

A unit gives each token the number of its piece, from 0 in reading order. A piece never crosses from one sequence into
another. A token that cannot be masked is a piece of its own; inside a word, as [UNK] may be, it does not end the word.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from megamask.batch import PackedBatch
from megamask.masking.rng import PackRng
from megamask.masking.settings import Unit as Unit


def pieces_of_unit(unit: Unit, batch: PackedBatch, rng: PackRng) -> Int64[Tensor, " T"]:
    """The number of the piece that each token belongs to."""
    rows = torch.arange(batch.layout.rows, device=batch.tokens.device)
    if unit == "token":
        return rows
    starts = batch.starts_word | (batch.layout.offset == 0)
    if unit == "span":
        starts = _span_starts(starts, batch, rng)
    # the first maskable token of each word or span gives the number to all of its maskable tokens
    group = starts.long().cumsum(0) - 1
    maskable = torch.where(batch.maskable, rows, len(rows))
    first = torch.full_like(rows, len(rows)).scatter_reduce_(0, group, maskable, "amin")[group]
    number = (~batch.maskable | (rows == first)).long().cumsum(0) - 1
    return torch.where(batch.maskable, number[first.clamp(max=len(rows) - 1)], number)


def _span_starts(words: Bool[Tensor, " T"], batch: PackedBatch, rng: PackRng) -> Bool[Tensor, " T"]:
    """Join neighbouring words to spans of a random number of words; a word without a maskable token is apart.

    Source: SpanBERT (Joshi et al. 2020, section 3.1): lengths in words, geometric with p = 0.2, at most 10 (mean
    3.8). Differs: there spans are drawn one by one and may meet; here the text is tiled with spans, of which the
    score then chooses, so every score and an exact budget work with spans as with words.
    """
    count = int(words.sum())
    maskable = torch.zeros(count, dtype=torch.bool, device=words.device)
    maskable[words.long().cumsum(0)[batch.maskable] - 1] = True
    apart = ~maskable
    apart[1:] |= ~maskable[:-1]  # and the word behind it begins a span
    chances = 0.8 ** np.arange(10)
    ends = np.searchsorted(np.cumsum(chances / chances.sum()), rng.uniform(count, torch.device("cpu")).numpy())
    first = np.zeros(count, dtype=bool)
    first[np.cumsum(np.minimum(ends, 9) + 1)[:-1].clip(max=count - 1)] = True
    starts = torch.zeros_like(words)
    starts[words] = torch.from_numpy(first).to(words.device) | apart | (batch.layout.offset == 0)[words]
    return starts
