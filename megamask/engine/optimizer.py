"""The optimizers and the groups of parameters they treat differently."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from megamask.errors import Removable, must
from megamask.schedules import LearningRate

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lamb": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
"""What each optimizer remembers of every weight, by the names of its own state."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients move the weights."""

    kind: Literal["adamw", "lamb", "muon"] = "adamw"
    """AdamW (fused); LAMB (ZeRO stage 0: its trust ratio needs whole tensors); Muon for the matrices inside layers
    and AdamW for the rest (ZeRO stages 1 to 3)."""
    rate: LearningRate = field(default_factory=LearningRate)
    """The learning rate over the steps."""
    muon_rate: float = 20.0
    """Muon's learning rate as a multiple of `rate`; for `muon` alone."""
    beta1: float = 0.9
    """Decay of the first moment (Muon: 0.95, its own)."""
    beta2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay per unit of learning rate; norms and biases have none."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 is no clipping."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong."""
        found = self.rate.problems(f"{name}.rate")
        for part in ("beta1", "beta2"):
            if not 0 <= getattr(self, part) < 1:
                found.append(must(f"{name}.{part}", "lie in [0, 1)", getattr(self, part)))
        if not self.eps > 0:
            found.append(must(f"{name}.eps", "be above 0", self.eps))
        for part in ("weight_decay", "clip"):
            if not 0 <= getattr(self, part) < math.inf:
                found.append(must(f"{name}.{part}", "be 0 or more", getattr(self, part)))
        if self.kind == "muon" and self.clip:
            why = f"must be 0 when the kind is 'muon', but is {self.clip}"
            cure = "DeepSpeed clips what Muon has already made orthogonal, which would shrink every step."
            found.append(Removable(f"{name}.clip", why, 0.0, cure))
        if self.kind != "muon" and self.muon_rate != OptimizerConfig.muon_rate:
            why = "has an effect on the kind 'muon' alone"
            found.append(Removable(f"{name}.muon_rate", why, OptimizerConfig.muon_rate))
        return found


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Every parameter once: no weight decay on norms and biases (fewer than two dimensions), Muon inside layers only.

    ``scale`` multiplies the learning rate of the group.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim >= 2
        muon = config.kind == "muon" and decayed and ".layers." in name
        setattr(parameter, "use_muon", muon)  # noqa: B010  DeepSpeed's ZeRO asks each parameter
        groups.setdefault((muon, decayed), []).append(parameter)
    found = []
    for (muon, decayed), parameters in groups.items():
        group: dict[str, Any] = {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0}
        group["scale"] = config.muon_rate if muon else 1.0
        if config.kind == "muon":
            group |= {"use_muon": muon, "lr": config.rate.peak}
            group |= {"momentum": 0.95} if muon else {"betas": (config.beta1, config.beta2), "eps": config.eps}
        found.append(group)
    return found


def optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    betas = (config.beta1, config.beta2)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.rate.peak, betas=betas, eps=config.eps, fused=True)
    if config.kind == "lamb":
        from pytorch_optimizer import Lamb

        return Lamb(groups, lr=config.rate.peak, betas=betas, eps=config.eps, max_grad_norm=0.0)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)


def moments_of(kind: str, muon: bool) -> tuple[str, ...]:
    """What an optimizer of ``kind`` remembers of a weight that is (not) under Muon."""
    return MOMENTS["adamw" if kind == "muon" and not muon else kind]
