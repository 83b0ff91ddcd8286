"""Settings of `megamask bench`, without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, MinLen

from megamask.errors import must
from megamask.errors.setting_rules import Count, Positive, ShareBelowOne, ShareInside
from megamask.model.shape import ModelConfig
from megamask.runtime.precision_choice import Precision, PrecisionSupport

COMPILED = ", compiled"
"""What the name of a compiled variant ends with."""


@dataclass(frozen=True)
class BenchConfig:
    """Measure tokens per second of megamask beside the masked-language-model example of transformers, in one run.

    Both train the same vocabulary, layers, width, sequence length, tokens per step and share of masked tokens on the
    same text. Variants take turns. Prints the machine, the method, and a Markdown table of medians.
    """

    what: Literal["trainer", "overheads", "late"] = "trainer"
    """`trainer`: speed beside that of transformers' Trainer; `overheads`: what entropy sources and teachers add to a
    plain step of the first `preset`; `late`: what 3ML and MAE-LM save of MLM's step, at 15, 30 and 50 % masked."""
    data: Path | None = None
    """Folder of token shards (`megamask prepare` makes it); without it, English text found on this machine."""
    text: Path | None = None
    """The raw text of the shards (.txt, .jsonl, .parquet), whose lines the padded Trainer reads. Without it, it reads
    whole documents, or paragraphs if the text was found on this machine."""
    preset: tuple[Literal["bert", "modern"], ...] = ("bert", "modern")
    """Presets of megamask; the Trainer has BERT."""
    size: Literal["tiny", "small", "base", "large"] = "tiny"
    """Layers and width, for both."""
    precisions: Annotated[tuple[Precision, ...], MinLen(1)] | None = None
    """Precisions to measure, for both. None: fp32, and bf16 if the device multiplies in it."""
    length: Annotated[int, Ge(8)] = 128
    """Longest sequence in tokens."""
    pack_tokens: int = 4096
    """Tokens of a pack, padding included. A step is one pack, or `pack_tokens` / `length` sequences of the Trainer;
    of `overheads`, four packs."""
    ratio: ShareInside = 0.15
    """Share of the tokens that are masked."""
    dropout: ShareBelowOne | None = None
    """Dropout, for both. None: their defaults, 0.1 in the Trainer and 0 in megamask."""
    rounds: Count = 5
    """Number of rounds, whose median is shown; one more round before them is not measured."""
    steps: Count = 3
    """Steps in a round; one more step before them is not measured."""
    threads: Count = 1
    """Threads of PyTorch."""
    compile: bool = False
    """Measure compiled variants too; takes minutes at the start."""
    peak_flops: Positive | None = None
    """Floating-point operations per second of the device, for MFU; known for common GPUs."""
    json: Path | None = None
    """File for the results of every round."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together, and for paths that would fail after minutes."""
        problems = []
        if self.length >= 8 and (self.pack_tokens < self.length or self.pack_tokens % self.length):
            problems.append(must("pack_tokens", f"be a multiple of `length` ({self.length})", self.pack_tokens))
        if self.data is not None and not self.data.is_dir():
            rule = "be a folder of token shards, which `megamask prepare` makes"
            problems.append(must("data", rule, str(self.data)))
        if self.text is not None and not self.text.exists():
            problems.append(must("text", "be a file or folder of text that exists", str(self.text)))
        if self.json is not None and (self.json.is_dir() or not os.access(self.json.parent, os.W_OK)):
            problems.append(must("json", "be a file in a folder that exists and can be written", str(self.json)))
        return problems

    def model(self, preset: Literal["bert", "modern"], *, compiled: bool = False) -> ModelConfig:
        """The same layers, width and longest sequence for all."""
        longest = max(512, self.length)
        return ModelConfig(preset, self.size, max_positions=longest, dropout=self.dropout or 0.0, compile=compiled)

    def measured(self, support: PrecisionSupport) -> tuple[Precision, ...]:
        """The precisions to measure on a device with ``support``."""
        return self.precisions or (("fp32", "bf16") if support.bf16 else ("fp32",))

    @property
    def needed(self) -> int:
        """Steps that a variant takes in all."""
        return (self.rounds + 1) * (self.steps + 1)
