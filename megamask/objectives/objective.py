"""Which objective a run trains, by name.

An objective is one answer, where [MASK] enters the network, as a module with ``states(batch, plan) -> (T, D)``,
``represent(batch, plan) -> (M, D)``, ``forward(batch, plan, soft) -> Losses`` and ``entropy(batch) -> (T,)``. It is
what the engine trains and what a checkpoint holds: ``encoder`` and ``head``, and beside them what an export drops.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megamask.batch import Measure
from megamask.errors import SHOWN, CheckpointError, ConfigError, listed, must, raise_all
from megamask.errors.setting_rules import settings_problems
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.objectives.mae_lm import MAELM, MAEDecoder
from megamask.objectives.mlm import MLM
from megamask.objectives.settings import ObjectiveConfig as ObjectiveConfig
from megamask.objectives.three_ml import ThreeML
from megamask.objectives.visible_tokens import MaskVector


def build_objective(config: ObjectiveConfig, encoder: Encoder, head: MaskedLMHead, measure: Measure = "shannon") -> MLM:
    """The objective that ``config`` names; ``Losses.entropy`` is by ``measure``.

    Its other modules run with the settings of the encoder. Raises ConfigError if it does not fit the encoder.
    """
    raise_all(ConfigError, settings_problems(config, "objective") + config.misfits("objective", encoder.shape))
    if not config.late:
        return MLM(encoder, head, measure)
    vector = MaskVector(encoder.shape, encoder.config.init_std) if config.mask_vector == "own" else None
    if config.kind == "mae_lm":
        return MAELM(encoder, head, MAEDecoder(encoder, config.decoder), vector, measure)
    assert config.depth is not None
    return ThreeML(encoder, head, config.depth, vector, measure)


@torch.no_grad()
def load_objective_weights(objective: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into the objective; other modules than the encoder may be missing, and stay as initialised.

    Modules of another objective, such as a decoder, are left out, so that a run of one kind can start from the weights
    of another. Raises CheckpointError, with nothing copied, for every tensor that is missing, unknown or of another
    shape.
    """
    own, parts = dict(objective.named_parameters()), dict(objective.named_children())
    weights = {name: tensor for name, tensor in weights.items() if part_of_weights(name) in parts}
    whole = {"encoder"} | {part_of_weights(name) for name in weights}
    problems = []
    if lacking := [name for name in own if name not in weights and part_of_weights(name) in whole]:
        problems.append(f"The weights lack {listed(lacking, 'tensor')}.")
    if strange := [name for name in weights if name not in own]:
        problems.append(f"The weights have {listed(strange, 'tensor')}, which this model does not have.")
    wrong = [name for name, tensor in weights.items() if name in own and own[name].shape != tensor.shape]
    problems += [
        must(name, f"have the shape {tuple(own[name].shape)}", tuple(weights[name].shape)) for name in wrong[:SHOWN]
    ]
    if len(wrong) > SHOWN:
        problems.append(f"{len(wrong) - SHOWN} more tensors have another shape.")
    raise_all(CheckpointError, problems)
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def part_of_weights(name: str) -> str:
    """The module of an objective that a tensor belongs to: `encoder`, `head`, or one that an export leaves out."""
    return name.split(".")[0]
