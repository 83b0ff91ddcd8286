"""What the chance of a chosen row means: weighed by its inverse, the chosen rows speak for all."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamask.masking.choose_within_budget import choose_pieces
from megamask.masking.piece_order import PieceTable
from megamask.masking.rng import PackRng
from megamask.masking.units import pieces_of_unit
from tests.batches import pack
from tests.tolerances import assert_close

UNITS = ["token", "word", "span"]
LENGTHS = [40, 3, 25, 64, 7, 12]  # so short that some have a share of no row at all in many draws


def scores(pieces: PieceTable) -> torch.Tensor:
    return torch.randn(len(pieces.size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("given", "temperature", "random_share", "budget"),
    [
        (False, 1.0, 0.0, 30),
        (True, 1.0, 0.0, 30),
        (True, 0.5, 0.2, 30),
        (True, 0.0, 0.3, 30),
        (True, 0.0, 0.1, 30),
        (True, 1.0, 0.5, 100),  # so many that the lot matters beside the score
    ],
)
def test_inverse_probability_weights_are_unbiased(given, temperature, random_share, budget):
    batch = pack(LENGTHS, padding=7)
    pieces, truth, draws = PieceTable.of_tokens(batch), int(batch.maskable.sum()), 600
    score = scores(pieces) if given else None
    counts = []
    for number in range(draws):
        one = dataclasses.replace(batch, number=number)
        chosen = choose_pieces(
            score, pieces, budget, one, PackRng(2, number), temperature=temperature, random_share=random_share
        )
        counts.append((1 / chosen.probability.double()).sum())
    estimates = torch.stack(counts)
    assert (estimates.mean() - truth).abs() <= 5 * estimates.std() / draws**0.5 + 1e-4


def test_inverse_probability_weights_are_unbiased_in_each_sequence():
    batch = pack(LENGTHS)
    score, draws = scores(PieceTable.of_tokens(batch)), 600
    home = batch.layout.sequence
    truth = torch.bincount(home[batch.maskable], minlength=6).double()
    estimates = torch.zeros(draws, 6, dtype=torch.float64)
    for number in range(draws):
        one = dataclasses.replace(batch, number=number)
        chosen = choose_pieces(
            score, PieceTable.of_tokens(batch), 15, one, PackRng(0, number), temperature=0.7, random_share=0.1
        )
        estimates[number].index_add_(0, home[chosen.rows], 1 / chosen.probability.double())
    error = estimates.std(0) / draws**0.5
    assert ((estimates.mean(0) - truth[:6]).abs() <= 5 * error).all()


@pytest.mark.parametrize("unit", UNITS)
def test_under_uniform_masking_every_token_has_the_mean_probability(unit):
    batch = pack(LENGTHS)
    rng = PackRng(0, 0)
    chosen = choose_pieces(None, pieces_of_unit(unit, batch, rng), 30, batch, rng)
    expected = torch.full((30,), 30 / int(batch.maskable.sum()))
    assert torch.equal(chosen.probability, expected)


def test_without_noise_and_exploration_what_is_taken_was_certain():
    batch = pack([42, 82])
    chosen = choose_pieces(
        scores(PieceTable.of_tokens(batch)), PieceTable.of_tokens(batch), 30, batch, PackRng(0, 0), temperature=0
    )
    assert int((chosen.probability == 1).sum()) >= 29  # one row may have hung on how a share was rounded


@pytest.mark.parametrize("random_share", [0.0, 0.4])
@pytest.mark.parametrize("unit", UNITS)
def test_fully_masked_text_has_probability_one(unit, random_share):
    batch = pack(LENGTHS)
    rng = PackRng(0, 0)
    available = int(batch.maskable.sum())
    pieces = pieces_of_unit(unit, batch, rng)
    chosen = choose_pieces(scores(pieces), pieces, available, batch, rng, random_share=random_share)
    assert torch.equal(chosen.probability, torch.ones(available))


@pytest.mark.parametrize("random_share", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_only_token_of_a_sequence_has_the_probability_of_a_share_of_one(temperature, random_share):
    batch = pack([3] * 20 + [42])
    score, seen = scores(PieceTable.of_tokens(batch)), 0
    for number in range(20):
        rng = PackRng(0, number)
        chosen = choose_pieces(
            score, PieceTable.of_tokens(batch), 15, batch, rng, temperature=temperature, random_share=random_share
        )
        probabilities = chosen.probability[chosen.rows < 60]
        seen += len(probabilities)
        assert_close(probabilities, torch.full_like(probabilities, 15 / 60))
    assert seen


@pytest.mark.parametrize("unit", UNITS)
def test_a_score_of_zeros_masks_as_no_score_does(unit):
    batch = pack(LENGTHS)
    pieces = pieces_of_unit(unit, batch, PackRng(0, 0))
    plain, zeros = (
        choose_pieces(score, pieces, 40, batch, PackRng(0, 1)) for score in (None, torch.zeros(len(pieces.size)))
    )
    assert torch.equal(plain.rows, zeros.rows)


@pytest.mark.parametrize("random_share", [0.0, 0.3])
@pytest.mark.parametrize("unit", ["word", "span"])
def test_at_most_one_piece_is_cut_under_any_score(unit, random_share):
    for number in range(30):
        batch = pack([50, 31, 64, 20], number=number, seed=number)
        rng = PackRng(0, number)
        pieces = pieces_of_unit(unit, batch, rng)
        rows = choose_pieces(scores(pieces), pieces, 45, batch, rng, temperature=0.5, random_share=random_share).rows
        hits = torch.bincount(pieces.piece[rows], minlength=len(pieces.size))
        assert int(((hits > 0) & (hits < pieces.size)).sum()) <= 1


@pytest.mark.parametrize("random_share", [0.0, 0.2, 0.9])
def test_every_sequence_gets_its_share_to_within_one_row_under_any_score(random_share):
    batch = pack(LENGTHS, padding=9)
    counts = torch.bincount(batch.layout.sequence[batch.maskable], minlength=7).double()
    score = 3 * batch.layout.sequence.float() + scores(
        PieceTable.of_tokens(batch)
    )  # later sequences score higher by far
    for number in range(50):
        rows = choose_pieces(
            score, PieceTable.of_tokens(batch), 45, batch, PackRng(0, number), random_share=random_share
        ).rows
        got = torch.bincount(batch.layout.sequence[rows], minlength=7).double()
        assert ((got - counts * 45 / counts.sum()).abs() < 1).all()
