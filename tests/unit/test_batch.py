"""The records that packages exchange."""

from __future__ import annotations

import pytest
import torch

from megamask.batch import Layout
from tests.batches import pack


@pytest.mark.parametrize("lengths", [[3], [5, 1, 7], [4, 4]])
def test_positions_of_a_layout_count_from_zero_in_each_sequence(lengths):
    by_hand = pack([length + 2 for length in lengths], padding=3).layout
    layout = Layout.of(by_hand.cu_seqlens.long(), by_hand.rows, by_hand.max_seqlen)
    assert torch.equal(layout.cu_seqlens, by_hand.cu_seqlens)
    assert torch.equal(layout.positions, by_hand.positions) and layout.positions.dtype == torch.int32
    assert torch.equal(layout.offset, layout.positions.long())


def test_tokens_that_are_kept_keep_their_positions():
    layout = pack([5, 4]).layout
    kept = layout.keep(torch.tensor([1, 4, 6]))
    assert kept.positions.tolist() == [1, 4, 1]
    assert (kept.sequence.tolist(), kept.offset.tolist()) == ([0, 0, 1], [0, 1, 0])
