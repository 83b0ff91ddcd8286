"""How many graphs torch.compile makes of an objective: as many as after the first pack, whatever documents follow."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.model import encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.objectives.objective import build_objective
from megamask.objectives.settings import DecoderConfig, ObjectiveConfig
from megamask.schedules import Schedule
from tests.batches import IDS, pack

DOCUMENTS = ([64, 30, 34], [128], [20] * 6 + [8], [3] * 40 + [8])
"""Lengths that fill 128 tokens."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(),
        ObjectiveConfig("three_ml", depth=1),
        ObjectiveConfig("mae_lm", decoder=DecoderConfig(1, "cross")),
    ],
)
def test_no_pack_after_the_first_is_compiled(objective, monkeypatch):
    eager = functools.partial(torch.compile, backend="eager")  # the same graphs, without a compiler for them
    monkeypatch.setattr(torch, "compile", eager)
    encoder.compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    config = ModelConfig("modern", "tiny", num_layers=3, hidden_size=64, compile=True)
    stack = encoder.Encoder(config.shape(IDS), config)
    model = build_objective(objective, stack, MaskedLMHead(stack, config))
    masker, counts = Masker(MaskingConfig(Schedule(start=0.3)), IDS), []
    for number, lengths in enumerate(DOCUMENTS):
        batch = pack(lengths, number=number, seed=number)
        model(batch, masker(batch, progress=0.5, rng=PackRng(0, number))).total.backward()
        counts.append(counters["stats"]["unique_graphs"])
    encoder.compiled.cache_clear()
    assert counts[0] > 0
    assert counts == counts[:1] * len(DOCUMENTS)
