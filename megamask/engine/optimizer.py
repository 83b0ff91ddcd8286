"""The optimizers and the groups of parameters they treat differently."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megamask.engine.settings import OptimizerConfig as OptimizerConfig
from megamask.runtime import private_api, ranks
from megamask.runtime.accelerator import choose_accelerator

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lamb": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
"""The tensors that each optimizer keeps for every weight, by the names in its state."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Every parameter once: no weight decay on norms and biases (fewer than two dimensions), Muon inside layers only.

    ``scale`` multiplies the learning rate of the group.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decayed = len(private_api.full_shape(parameter)) >= 2
        muon = config.kind == "muon" and decayed and ".layers." in name
        setattr(parameter, "use_muon", muon)  # noqa: B010  DeepSpeed's ZeRO reads it
        groups.setdefault((muon, decayed), []).append(parameter)
    result = []
    for (muon, decayed), parameters in groups.items():
        group: dict[str, Any] = {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0}
        group["scale"] = config.muon_lr_scale if muon else 1.0
        if config.kind == "muon":
            group |= {"use_muon": muon, "lr": config.lr.peak}
            group |= {"momentum": 0.95} if muon else {"betas": (config.beta1, config.beta2), "eps": config.eps}
        result.append(group)
    return result


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    betas = (config.beta1, config.beta2)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr.peak, betas=betas, eps=config.eps, fused=True)
    if config.kind == "lamb":
        from pytorch_optimizer import Lamb

        return Lamb(groups, lr=config.lr.peak, betas=betas, eps=config.eps, max_grad_norm=0.0)
    choose_accelerator()
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    if ranks.device().type == "cpu":
        private_api.run_muon_uncompiled((original_muon, muon_optimizer))
    return muon_optimizer.MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)


def moments_of(kind: str, muon: bool) -> tuple[str, ...]:
    """The tensors that an optimizer of ``kind`` keeps for a weight; ``muon``: whether Muon trains this weight."""
    return MOMENTS["adamw" if kind == "muon" and not muon else kind]
