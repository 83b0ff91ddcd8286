"""Packs made up for tests: random tokens, words and document lengths, with special tokens at both ends."""

from __future__ import annotations

import torch

from megamask.batch import Layout, PackedBatch, TokenIds
from megamask.data.packs import Packs

IDS = TokenIds(size=97, cls=2, sep=3, pad=0, mask=4, special=(0, 1, 2, 3, 4))


def pack(lengths: list[int], *, padding: int = 0, number: int = 0, seed: int = 0, ids: TokenIds = IDS) -> PackedBatch:
    """A pack of sequences of these ``lengths``, special tokens included, and ``padding`` rows behind them."""
    draws = torch.Generator().manual_seed(seed)
    sequences = lengths + ([padding] if padding else [])
    rows = sum(sequences)
    ends = torch.tensor(sequences).cumsum(0)
    starts = ends - torch.tensor(sequences)
    tokens = torch.randint(len(ids.special), ids.size, (rows,), generator=draws)
    tokens[starts], tokens[ends - 1] = ids.cls, ids.sep
    if padding:
        tokens[rows - padding :] = ids.pad
    maskable = ~torch.isin(tokens, torch.tensor(ids.special))
    starts_word = (torch.rand(rows, generator=draws) < 0.6) | ~maskable
    starts_word[(starts + 1).clamp(max=rows - 1)] = True
    positions = torch.cat([torch.arange(n) for n in sequences]).int()
    cu_seqlens = torch.cat([torch.zeros(1), ends, torch.full((2,), rows)]).int()  # and two empty sequences
    return PackedBatch(number, tokens, Layout(cu_seqlens, max(sequences), positions), starts_word, maskable)


def text_positions(packs: Packs, number: int) -> torch.Tensor:
    """The position of each token of a pack in the text of its split; -1 for [CLS], [SEP] and padding."""
    positions, begins, ends = packs._stream(packs.text_of(number))
    positions[begins] = positions[ends - 1] = -1
    places = torch.full((packs.tokens,), -1)
    places[: len(positions)] = torch.from_numpy(positions)
    return places
