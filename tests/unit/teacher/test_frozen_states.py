"""The states of a frozen model at a few rows do not need the other rows of the last layer."""

from __future__ import annotations

import pytest
import torch

from megamask.teacher.frozen_lm import HiddenStatesFn
from tests.batches import pack
from tests.tolerances import assert_close
from tests.unit.model.models import objective


@pytest.mark.parametrize("preset", ["bert", "modern"])
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_states_at_few_rows_are_those_of_a_whole_pass(preset: str, layers: int) -> None:
    """The last layer of `modern` attends to all tokens of a sequence if there are 1 or 4 layers, and not if 3."""
    model = objective(preset, num_layers=layers, global_every=3, local_window=4)
    states = HiddenStatesFn(model.encoder, model.head).eval()
    batch = pack([9, 1, 14, 3], padding=5)
    rows = torch.tensor([0, 4, 9, 12, 13, 24])
    with torch.inference_mode():
        expected = states(batch.tokens, batch.layout, rows)
        assert_close(states.at_few_rows(batch.tokens, batch.layout, rows), expected)
