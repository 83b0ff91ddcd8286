"""Pieces of a pack: words and spans, against loops over single tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamask.batch import PackedBatch
from megamask.masking.choose_within_budget import choose_pieces
from megamask.masking.rng import PackRng
from megamask.masking.units import pieces_of_unit
from tests.batches import pack


def with_unknown_tokens(seed: int) -> PackedBatch:
    """A pack in which a fifth of the tokens of the text cannot be masked, at the start of words and inside."""
    batch = pack([40, 3, 57, 20], padding=9, seed=seed)
    unknown = torch.rand(batch.layout.rows, generator=torch.Generator().manual_seed(seed)) < 0.2
    return dataclasses.replace(batch, maskable=batch.maskable & ~unknown)


def words_by_loop(batch: PackedBatch) -> list[tuple[int, ...]]:
    """The maskable tokens of each word, in order; a token that cannot be masked is alone."""
    words: list[list[int]] = []
    current: list[int] = []
    for row in range(batch.layout.rows):
        if batch.starts_word[row] or batch.layout.offset[row] == 0:
            current = []
        if not batch.maskable[row]:
            words.append([row])
        elif current:
            current.append(row)
        else:
            current = [row]
            words.append(current)
    return [tuple(word) for word in words]


def test_words_are_those_of_a_loop_over_tokens():
    interrupted = 0
    for seed in range(10):
        batch = with_unknown_tokens(seed)
        piece = pieces_of_unit("word", batch, PackRng(0, 0)).piece
        words = [tuple((piece == number).nonzero().squeeze(1).tolist()) for number in range(int(piece.max()) + 1)]
        assert words == words_by_loop(batch)
        interrupted += sum(word[-1] - word[0] >= len(word) for word in words)
    assert interrupted  # words that continue behind a token that cannot be masked


@pytest.mark.parametrize("seed", range(5))
def test_spans_are_whole_words_and_leave_out_unknown_tokens(seed):
    batch = with_unknown_tokens(seed)
    word, span = (pieces_of_unit(unit, batch, PackRng(0, seed)).piece for unit in ("word", "span"))
    assert all(len(span[word == number].unique()) == 1 for number in word.unique())
    assert int(span.max()) < int(word.max())
    for number in span.unique():
        rows = (span == number).nonzero().squeeze(1)
        assert len(batch.layout.sequence[rows].unique()) == 1
        assert batch.maskable[rows].all() or len(rows) == 1


@pytest.mark.parametrize("unit", ["word", "span"])
def test_a_word_with_an_unknown_token_is_masked_whole_except_for_it(unit):
    for seed in range(20):
        batch = with_unknown_tokens(seed)
        pieces = pieces_of_unit(unit, batch, PackRng(0, seed))
        piece = pieces.piece
        chosen = choose_pieces(torch.zeros(len(pieces.size)), pieces, 20, batch, PackRng(1, seed)).rows
        assert len(chosen.unique()) == 20 and batch.maskable[chosen].all()
        hits, sizes = torch.bincount(piece[chosen], minlength=int(piece.max()) + 1), torch.bincount(piece)
        assert int(((hits > 0) & (hits < sizes)).sum()) <= 1  # only one is cut, to fill the budget
