"""What tests of the vocabulary's size share."""

from __future__ import annotations

import pytest

from megamask.model import cross_entropy_and_kl, statistics


@pytest.fixture
def chunks(monkeypatch):
    """Sets how many logits make a block and a piece."""

    def set_sizes(block, piece):
        monkeypatch.setattr(cross_entropy_and_kl, "BLOCK", block)
        monkeypatch.setattr(statistics, "BLOCK", block)
        monkeypatch.setattr(statistics, "PIECE", piece)

    return set_sizes
