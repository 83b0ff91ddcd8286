"""In which pieces a pack is masked: single tokens, whole words, or spans of words.

A unit gives every row the number of its piece. Pieces are runs of rows, numbered from 0 in reading order, and
never cross from one sequence into another.
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
    """The number of the piece that each row belongs to."""
    if unit == "token":
        return torch.arange(batch.layout.rows, device=batch.tokens.device)
    starts = _word_starts(batch)
    if unit == "span":
        starts = _span_starts(starts, _breaks(batch), rng)
    return starts.long().cumsum(0) - 1


def _breaks(batch: PackedBatch) -> Bool[Tensor, " T"]:
    """Rows at which any piece must end: the first of a sequence, special rows and the row behind each."""
    apart = ~batch.maskable
    behind = torch.cat([apart.new_ones(1), apart[:-1]])
    return apart | behind | (batch.layout.offset == 0)


def _word_starts(batch: PackedBatch) -> Bool[Tensor, " T"]:
    return batch.starts_word | _breaks(batch)


def _span_starts(words: Bool[Tensor, " T"], breaks: Bool[Tensor, " T"], rng: PackRng) -> Bool[Tensor, " T"]:
    """Joins neighbouring words to spans of a random number of words.

    Source: SpanBERT (Joshi et al. 2020, section 3.1): lengths in words, geometric with p = 0.2, at most 10 (mean
    3.8). Differs: there spans are drawn one by one and may meet; here the text is tiled with spans, of which the
    score then chooses, so every score and an exact budget work with spans as with words.
    """
    word_breaks = breaks[words].cpu().numpy()
    count = len(word_breaks)
    chances = 0.8 ** np.arange(10)
    ends = np.searchsorted(np.cumsum(chances / chances.sum()), rng.uniform(count, torch.device("cpu")).numpy())
    first = np.zeros(count, dtype=bool)
    first[np.cumsum(np.minimum(ends, 9) + 1)[:-1].clip(max=count - 1)] = True
    starts = torch.zeros_like(words)
    starts[words] = torch.from_numpy(first | word_breaks).to(words.device)
    return starts
