"""The precision that a user asks for, and what follows from it on a device; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "fp32"]
Setting = Literal["auto", "bf16", "fp32"]
"""What a user asks for; `auto` is bf16 where `PrecisionSupport.bf16` is true, else fp32."""


@dataclass(frozen=True)
class PrecisionSupport:
    """Whether a device multiplies matrices in bf16, and how one can tell."""

    bf16: bool
    reason: str


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision of a model; ``setting`` is the name of what decided it, with the value ``asked``."""

    setting: str
    asked: Setting
    support: PrecisionSupport

    @property
    def precision(self) -> Precision:
        """The precision that the model is computed in."""
        if self.asked == "auto":
            return "bf16" if self.support.bf16 else "fp32"
        return self.asked

    @property
    def slow(self) -> bool:
        """Whether bf16 is ordered on a device that does not multiply in it."""
        return self.precision == "bf16" and not self.support.bf16

    def __str__(self) -> str:
        if self.asked == "auto":
            return f"{self.precision}, because {self.support.reason}"
        return f"{self.precision}, as {self.setting} says"
