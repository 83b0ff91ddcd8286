"""Types that the settings of several packages and the records of `batch` share; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Measure = Literal["shannon", "renyi", "min", "margin", "loss"]
"""Measure of the uncertainty of a prediction p, in nats. ``shannon``: -sum p log p; ``renyi``: of order 2,
-log sum p^2; ``min``: min-entropy, -log max p; ``margin``: log of the second likeliest over the likeliest, at most 0;
``loss``: -log p(true token), which needs the label."""


@dataclass(frozen=True)
class TokenIds:
    """The ids of a tokenizer that megamask must know: how many there are and which are special."""

    size: int
    cls: int
    sep: int
    pad: int
    mask: int
    special: tuple[int, ...]
    """Every id that is never masked and never drawn as a random replacement, the four above included."""
