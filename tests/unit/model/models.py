"""Small objectives with random weights for tests."""

from __future__ import annotations

from typing import Any

import torch

from megamask.batch import MaskPlan, PackedBatch
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.objectives.mlm import MLM
from tests.batches import IDS

PRESETS = ["bert", "modern"]
SMALL = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "max_positions": 64}


def config(preset: str, **settings: Any) -> ModelConfig:
    return ModelConfig(**{"preset": preset, **SMALL, **settings})


def objective(preset: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> MLM:
    """An MLM whose every parameter is random, biases and norms too, so that none can be forgotten unseen."""
    torch.manual_seed(seed)
    chosen = config(preset, **{"init_std": 0.2, **settings})
    encoder = Encoder(chosen.shape(IDS), chosen)
    model = MLM(encoder, MaskedLMHead(encoder, chosen))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.to(dtype)


def plan(batch: PackedBatch, every: int = 4) -> MaskPlan:
    """Every n-th ordinary token is hidden and asked for."""
    targets = batch.maskable.nonzero().squeeze(1)[::every]
    inputs = batch.tokens.clone()
    inputs[targets] = IDS.mask
    visible = torch.ones_like(batch.maskable)
    visible[targets] = False
    return MaskPlan(inputs, targets, batch.tokens[targets], targets, visible.nonzero().squeeze(1))
