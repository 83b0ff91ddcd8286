"""Variants take turns, a round each, so that whatever else a machine does troubles all alike; medians are compared.

What counts as a token is the same for all: text, without padding and special tokens. Seconds are those of the process
(all its threads), which other processes on the machine disturb little, and those of the wall.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool
from tqdm import tqdm

from megamask.batch import TokenIds


@dataclass(frozen=True)
class Round:
    """Some steps of a variant."""

    tokens: int
    """Of text: padding and special tokens are not counted."""
    rows: int
    """All that went through the network."""
    targets: int
    """Masked tokens."""
    wall: float
    """Seconds."""
    cpu: float
    """Seconds of the process, all its threads together."""
    flops: float | None = None
    """Of the matrix products that the steps need, where that is known."""


@runtime_checkable
class Variant(Protocol):
    """One line of the table."""

    name: str

    def run(self, steps: int) -> Round:
        """Takes one step that is not counted, then ``steps`` that are."""
        ...


class Clock:
    """Seconds between ``start`` and ``stop``, each read once the device has done all that it was told."""

    def start(self) -> None:
        _wait()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        _wait()
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def is_text_file(ids: TokenIds) -> Bool[np.ndarray, " V"]:
    """Whether each id counts as a token."""
    counted = np.ones(ids.size, bool)
    counted[list(ids.special)] = False
    return counted


def in_turn(
    variants: Sequence[Variant], rounds: int, steps: int, tell: Callable[[str], None] = lambda line: None
) -> dict[str, list[Round]]:
    """``rounds`` rounds of each variant by its name, A B C A B C ...; one before them is thrown away.

    ``tell`` gets a line after each round of a variant: its speed, and the time that all others are likely to take.
    """
    found: dict[str, list[Round]] = {variant.name: [] for variant in variants}
    begin, left = time.perf_counter(), (rounds + 1) * len(variants)
    total = left
    for turn in range(rounds + 1):
        for variant in variants:
            seen = variant.run(steps)
            left -= 1
            seconds = (time.perf_counter() - begin) / (total - left) * left
            speed = f"{seen.tokens / seen.wall:,.0f} tokens/s, left {tqdm.format_interval(seconds)}"
            tell(f"round {turn} of {rounds}: {variant.name}: {speed}")
            if turn:
                found[variant.name].append(seen)
    return found


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds of a variant."""

    per_second: float
    """Tokens per second of the wall."""
    per_cpu_second: float
    """Tokens per second of the process."""
    fill: float
    """Share of the rows that are tokens of text."""
    masked: float
    """Share of the tokens that are masked."""
    flops_per_second: float | None
    """Of the wall, where the FLOPs are known."""

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> Figures:
        flops = [r.flops / r.wall for r in rounds if r.flops is not None]
        return cls(
            per_second=statistics.median(r.tokens / r.wall for r in rounds),
            per_cpu_second=statistics.median(r.tokens / r.cpu for r in rounds),
            fill=statistics.median(r.tokens / r.rows for r in rounds),
            masked=statistics.median(r.targets / r.tokens for r in rounds),
            flops_per_second=statistics.median(flops) if flops else None,
        )
