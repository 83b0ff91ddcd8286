"""Variants take turns, a round each, so that whatever else a machine does troubles all alike; medians are compared.

What counts as a token is the same for all: text, without padding and special tokens. Seconds are those of the process
(all its threads), which other processes on the machine disturb little, and those of the wall.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool
from tqdm import tqdm

from megamask.batch import TokenIds
from megamask.errors import must
from megamask.model.shape import ModelConfig
from megamask.precision import Precision, Support


@dataclass(frozen=True)
class BenchConfig:
    """What to measure, and how long."""

    what: Literal["trainer", "overheads", "late"] = "trainer"
    """`trainer`: our speed beside that of transformers' Trainer; `overheads`: what sources of entropy and a teacher
    add to a plain step of the first `preset`; `late`: what 3ML and MAE-LM save of MLM's step, at 15, 30 and 50 %."""
    data: Path | None = None
    """Folder of token shards (tools/prepare_data.py makes it); without it, English that this machine holds."""
    text: Path | None = None
    """The raw text of the shards (.txt, .jsonl, .parquet): its lines are what is padded. Without it whole documents
    are, or, of the text that this machine holds, paragraphs."""
    preset: tuple[Literal["bert", "modern"], ...] = ("bert", "modern")
    """Presets of megamask; the Trainer has BERT."""
    size: Literal["tiny", "small", "base", "large"] = "tiny"
    """Layers and width, of both sides."""
    precisions: tuple[Precision, ...] | None = None
    """Precisions of both sides; without it fp32, and bf16 where the device multiplies in it."""
    length: int = 128
    """Longest sequence in rows."""
    rows: int = 4096
    """Rows of a step: one pack, or as many sequences as fill them."""
    ratio: float = 0.15
    """Share of the tokens that are masked."""
    dropout: float | None = None
    """Dropout of both sides; without it each has its own: theirs 0.1, ours 0."""
    rounds: int = 5
    """Rounds whose median is shown, after one that is not counted."""
    steps: int = 3
    """Steps of a round, after one that is not counted."""
    threads: int = 1
    """Threads of PyTorch."""
    compile: bool = False
    """Measure compiled variants too; minutes at the start."""
    peak_flops: float | None = None
    """Floating-point operations per second of the device, for MFU; known GPUs need no number."""
    json: Path | None = None
    """File for the figures of every round."""

    def problems(self) -> list[str]:
        """Sentences for what is wrong."""
        found = [must("length", "be at least 8", self.length)] if self.length < 8 else []
        for name in ("rounds", "steps", "threads"):
            if getattr(self, name) < 1:
                found.append(must(name, "be at least 1", getattr(self, name)))
        if self.length >= 8 and (self.rows < self.length or self.rows % self.length):
            found.append(must("rows", f"be a multiple of `length` ({self.length})", self.rows))
        if self.precisions is not None and not self.precisions:
            found.append(must("precisions", "name at least one precision", self.precisions))
        if not 0 < self.ratio < 1:
            found.append(must("ratio", "lie in (0, 1)", self.ratio))
        if self.dropout is not None and not 0 <= self.dropout < 1:
            found.append(must("dropout", "lie in [0, 1)", self.dropout))
        if self.peak_flops is not None and not self.peak_flops > 0:
            found.append(must("peak_flops", "be above 0", self.peak_flops))
        return found

    def model(self, preset: Literal["bert", "modern"], *, compiled: bool = False) -> ModelConfig:
        """The same layers, width and longest sequence for all."""
        longest = max(512, self.length)
        return ModelConfig(preset, self.size, max_positions=longest, dropout=self.dropout or 0.0, compile=compiled)

    def measured(self, support: Support) -> tuple[Precision, ...]:
        """The precisions to measure on a device with ``support``."""
        return self.precisions or (("fp32", "bf16") if support.bf16 else ("fp32",))

    @property
    def needed(self) -> int:
        """Steps that a variant takes in all."""
        return (self.rounds + 1) * (self.steps + 1)


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


def is_text(ids: TokenIds) -> Bool[np.ndarray, " V"]:
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
