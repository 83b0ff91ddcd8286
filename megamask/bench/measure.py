"""Variants take turns, a round each, so that other work on the machine disturbs all alike; medians are compared.

The same counts as a token for all: text, without padding and special tokens. CPU seconds are those of the process (all
its threads), which other processes on the machine disturb little.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
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
    """Of text: padding and special tokens do not count."""
    rows: int
    """All positions that went through the network."""
    targets: int
    """Masked tokens."""
    wall: float
    """Seconds."""
    cpu: float
    """Seconds of the process, all its threads together."""
    flops: float | None = None
    """FLOPs of the matrix products of the steps, if known."""

    def seconds(self, *, by_cpu: bool) -> float:
        return self.cpu if by_cpu else self.wall


@runtime_checkable
class Variant(Protocol):
    """One line of the table."""

    name: str

    def run(self, steps: int) -> Round:
        """Take one step that is not measured, then ``steps`` that are."""
        ...


class Clock:
    """Seconds between ``start`` and ``stop``, each read once the device is idle."""

    def start(self) -> None:
        _wait()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        _wait()
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def text_token_mask(ids: TokenIds) -> Bool[np.ndarray, " V"]:
    """Whether each id counts as a token."""
    counted = np.ones(ids.size, bool)
    counted[list(ids.special)] = False
    return counted


def measure_in_turn(variants: Sequence[Variant], rounds: int, steps: int) -> dict[str, list[Round]]:
    """``rounds`` rounds of each variant by its name, A B C A B C ...; one round before them is discarded.

    After each round of a variant prints its speed and the estimated time left to stderr.
    """
    results: dict[str, list[Round]] = {variant.name: [] for variant in variants}
    begin, total, done = time.perf_counter(), (rounds + 1) * len(variants), 0
    for number in range(rounds + 1):
        for variant in variants:
            result = variant.run(steps)
            done += 1
            left = tqdm.format_interval((time.perf_counter() - begin) / done * (total - done))
            speed = f"{result.tokens / result.wall:,.0f} tokens/s, ETA {left}"
            print(f"round {number} of {rounds}: {variant.name}: {speed}", file=sys.stderr, flush=True)
            if number:
                results[variant.name].append(result)
    return results


@dataclass(frozen=True)
class Medians:
    """Medians over the rounds of a variant."""

    per_second: float
    """Tokens per second."""
    per_cpu_second: float
    """Tokens per CPU second of the process."""
    fill: float
    """Share of the positions that are tokens of text."""
    masked: float
    """Share of the tokens that are masked."""
    flops_per_second: float | None
    """Where the FLOPs are known."""

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> Medians:
        flops = [r.flops / r.wall for r in rounds if r.flops is not None]
        return cls(
            per_second=statistics.median(r.tokens / r.wall for r in rounds),
            per_cpu_second=statistics.median(r.tokens / r.cpu for r in rounds),
            fill=statistics.median(r.tokens / r.rows for r in rounds),
            masked=statistics.median(r.targets / r.tokens for r in rounds),
            flops_per_second=statistics.median(flops) if flops else None,
        )

    def speed(self, *, by_cpu: bool) -> float:
        """Tokens per second, or per CPU second."""
        return self.per_cpu_second if by_cpu else self.per_second
