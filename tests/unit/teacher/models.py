"""Small models and packs for tests of teachers."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from megamask.batch import MaskPlan
from megamask.schedules import Schedule
from megamask.teacher.teacher import DistillConfig

SIZES = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "max_positions": 64}
FULL = DistillConfig(Schedule(start=0.5))
LENGTHS = [[9, 20, 3], [14, 14, 6], [25, 5]]
ROOT = Path(__file__).parents[3]


def plan_of(batch, ids) -> MaskPlan:
    targets = batch.maskable.nonzero().squeeze(1)[::3]
    visible = torch.ones_like(batch.maskable).index_fill_(0, targets, False).nonzero().squeeze(1)
    return MaskPlan(batch.tokens.index_fill(0, targets, ids.mask), targets, batch.tokens[targets], targets, visible)


def randomise(model) -> None:
    """Random values in biases and norms too, so that a test notices a missing one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def logits_of(soft):
    return F.linear(soft.hidden, soft.weight, soft.bias)


def padded_logits(model, inputs, layout):
    """The logits of transformers' model for every row, each sequence alone."""
    logits = [model(input_ids=part[None]).logits[0] for part in inputs.split(layout.lengths.tolist()) if len(part)]
    return torch.cat(logits)
