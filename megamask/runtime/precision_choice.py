"""The precision that a setting requests, and the one that a device gets. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "fp32"]
Setting = Literal["auto", "bf16", "fp32"]
"""The value of a setting; `auto` is bf16 if `PrecisionSupport.bf16` is true, else fp32."""


@dataclass(frozen=True)
class PrecisionSupport:
    """Whether a device multiplies matrices in bf16, and why."""

    bf16: bool
    reason: str


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision of a model; ``setting`` is the name of the setting that decided it, ``requested`` its value.

    The name is empty if there is only the default.
    """

    setting: str
    requested: Setting
    support: PrecisionSupport

    @property
    def precision(self) -> Precision:
        """The precision of the computation."""
        if self.requested == "auto":
            return "bf16" if self.support.bf16 else "fp32"
        return self.requested

    @property
    def slow(self) -> bool:
        """Whether a setting requests bf16 on a device that does not multiply in bf16."""
        return self.precision == "bf16" and not self.support.bf16

    def __str__(self) -> str:
        if self.requested == "auto":
            return f"{self.precision}, because {self.support.reason}"
        if not self.setting:
            return f"{self.precision}, the default: no DeepSpeed file sets bf16"
        return f"{self.precision}, as {self.setting} says"
