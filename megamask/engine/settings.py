"""The settings of the optimizer; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import FiniteFloat

from megamask.errors import Removable
from megamask.errors.setting_rules import NotNegative, OnlyFor, Positive, ShareBelowOne
from megamask.schedules import LearningRate


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, which updates the weights from their gradients."""

    kind: Literal["adamw", "lamb", "muon"] = "adamw"
    """AdamW (fused); LAMB (ZeRO stage 0: its trust ratio needs whole tensors); Muon for the matrices inside layers
    and AdamW for the rest (ZeRO stages 1 to 3)."""
    lr: LearningRate = field(default_factory=LearningRate)
    """The learning rate over the steps."""
    muon_lr_scale: Annotated[FiniteFloat, OnlyFor("kind", "muon")] = 20.0
    """Muon's learning rate as a multiple of `lr`."""
    beta1: ShareBelowOne = 0.9
    """Decay of the first moment. The momentum of Muon is always 0.95."""
    beta2: ShareBelowOne = 0.98
    """Decay of the second moment."""
    eps: Positive = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay per unit of learning rate; norms and biases have none."""
    max_grad_norm: NotNegative = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        if self.kind != "muon" or not self.max_grad_norm:
            return []
        why = f"must be 0 when the kind is 'muon', but is {self.max_grad_norm}"
        cure = "DeepSpeed clips what Muon has already made orthogonal, which would shrink every step."
        return [Removable(f"{name}.max_grad_norm", why, 0.0, cure)]
