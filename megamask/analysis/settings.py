"""Settings of `megamask analyze-rank` and `megamask show-masks`, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Lt

from megamask.errors import must
from megamask.errors.setting_rules import Count, OnlyFor, ShareInside
from megamask.masking.settings import EntropyScoreConfig

SENTENCE = "The river froze that winter, and for three weeks no ship could leave the harbour of Rotterdam."
SMALLEST = 1e-6
"""Thresholds below this, as a share of the largest singular value, come too near to the noise."""


@dataclass(frozen=True)
class RankConfig:
    """Compare how many dimensions the hidden states of real tokens and of [MASK] fill, layer by layer.

    Several `--run` and `--model` are compared on the same text.
    """

    output: Path
    """Folder for ranks.md (tables), ranks.png (a picture) and ranks.json (everything, and how it was made)."""
    run: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Run folder, a checkpoint in one, or initial weights; may be given several times."""
    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Folder or name of an encoder for transformers, such as an exported run; may be given several times."""
    data: Path | None = None
    """Folder of token shards, whose validation split is read; by default the shards of the first run."""
    text: Path | None = None
    """A text file to read instead of shards, with the tokenizer of each encoder."""
    step: Annotated[int | None, OnlyFor("run")] = None
    """The checkpoint of each run; by default its newest."""
    ratio: ShareInside = 0.15
    """Share of the tokens that are replaced by [MASK]."""
    tokens: Count = 100_000
    """Smallest number of tokens of text to read."""
    length: Annotated[int, Ge(3)] | None = None
    """Longest sequence in tokens, with [CLS] and [SEP]; by default 512, or less if an encoder cannot read as many."""
    energy: ShareInside = 0.9
    """The energy rank is the number of directions that contain this share of the squared norm."""
    threshold: Annotated[float, Ge(SMALLEST), Lt(1)] = 0.01
    """The numerical rank counts singular values above this share of the largest; smaller ones are rounding."""
    centred: bool = False
    """Print the tables of the states with their mean subtracted; the files have both."""
    seed: int = 0
    """Seed of the order of the text and of the masks."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what the settings cannot do together."""
        problems = []
        if not self.run and not self.model:
            problems.append("`run` or `model` must name at least one encoder.")
        if self.data is not None and self.text is not None:
            problems.append("`data` and `text` both say what to read. Remove one.")
        if not self.run and self.data is None and self.text is None:
            problems.append("A `model` does not say what text to read: name `data` or `text`.")
        if self.output.exists() and not self.output.is_dir():
            problems.append(must("output", "be a folder", str(self.output)))
        return problems


@dataclass(frozen=True)
class ShowMasksConfig:
    """Show sentences under every masking strategy, with the entropy of each token."""

    data: Path | None = None
    """Folder of token shards; without a model, a token's entropy is minus the log of its frequency there."""
    model: Path | None = None
    """Folder of a masked language model for transformers, such as an exported run, whose entropies are shown."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; by default that of the model, or of the data."""
    sentence: tuple[str, ...] = (SENTENCE,)
    """Sentences to mask."""
    signal: Annotated[Literal["clean", "masked"], OnlyFor("model")] = "masked"
    """Whether the model sees the token that it predicts (clean) or [MASK] in its place (masked)."""
    ratio: ShareInside = 0.3
    """Share of the tokens that are masked."""
    score: EntropyScoreConfig = field(default_factory=lambda: EntropyScoreConfig(temperature=0.0))
    """How entropy decides; each strategy is shown."""
    seed: int = 0
    """Seed of the noise."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what the settings cannot do together."""
        problems = []
        if self.score.strategy != "high":
            problems.append("`score.strategy` has no effect: each strategy is shown. Remove it.")
        if self.data is None and self.model is None:
            problems.append("Entropies come from `data` (frequency) or from `model`: name one of them.")
        if self.data is not None and self.model is not None:
            problems.append("`data` has no effect with `model`, which has a tokenizer and entropies. Remove one.")
        return problems
