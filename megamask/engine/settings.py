"""The settings of the optimizer; without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megamask.errors import Removable, must
from megamask.schedules import LearningRate


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients move the weights."""

    kind: Literal["adamw", "lamb", "muon"] = "adamw"
    """AdamW (fused); LAMB (ZeRO stage 0: its trust ratio needs whole tensors); Muon for the matrices inside layers
    and AdamW for the rest (ZeRO stages 1 to 3)."""
    lr: LearningRate = field(default_factory=LearningRate)
    """The learning rate over the steps."""
    muon_lr_scale: float = 20.0
    """Muon's learning rate as a multiple of `rate`; for `muon` alone."""
    beta1: float = 0.9
    """Decay of the first moment (Muon: 0.95, its own)."""
    beta2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay per unit of learning rate; norms and biases have none."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; 0 is no clipping."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong."""
        found = self.lr.problems(f"{name}.lr")
        for part in ("beta1", "beta2"):
            if not 0 <= getattr(self, part) < 1:
                found.append(must(f"{name}.{part}", "lie in [0, 1)", getattr(self, part)))
        if not self.eps > 0:
            found.append(must(f"{name}.eps", "be above 0", self.eps))
        for part in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, part) < math.inf:
                found.append(must(f"{name}.{part}", "be 0 or more", getattr(self, part)))
        if self.kind == "muon" and self.max_grad_norm:
            why = f"must be 0 when the kind is 'muon', but is {self.max_grad_norm}"
            cure = "DeepSpeed clips what Muon has already made orthogonal, which would shrink every step."
            found.append(Removable(f"{name}.max_grad_norm", why, 0.0, cure))
        if self.kind != "muon" and self.muon_lr_scale != OptimizerConfig.muon_lr_scale:
            why = "has an effect on the kind 'muon' alone"
            found.append(Removable(f"{name}.muon_lr_scale", why, OptimizerConfig.muon_lr_scale))
        return found
