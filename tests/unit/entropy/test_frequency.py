"""Minus log unigram probability."""

from __future__ import annotations

import math

import torch

from megamask.entropy.frequency import Frequency, unigram_surprisal
from tests.unit.entropy.models import counts, some_packs


def test_it_is_minus_log_of_the_smoothed_share():
    table = unigram_surprisal(torch.tensor([0, 3, 4]))
    expected = torch.tensor([math.log(10), math.log(10 / 4), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(table, expected, rtol=1e-12, atol=0)


def test_rare_tokens_come_first_and_nothing_is_learned():
    source, batch = Frequency(counts()), some_packs()[0]
    entropies = source([batch])[0]
    order = entropies.argsort()
    assert (counts()[batch.tokens[order]].diff() <= 0).all()
    assert entropies.isfinite().all() and source.state_dict() == {}
