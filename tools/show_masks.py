#!/usr/bin/env python
"""A real sentence under each way to mask it, with the entropies: ``tools/show_masks.py --data DIR --sentence TEXT``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the megamask of this clone, installed or not
from megamask.runtime import entry_point

if __name__ == "__main__":
    entry_point.begin()

import tyro
from rich.console import Console

from megamask.errors import ConfigError, must, raise_all
from megamask.masking.settings import EntropyScoreConfig

if TYPE_CHECKING:
    from torch import Tensor

    from megamask.analysis import show_masks
    from megamask.data.shards import Shards

SENTENCE = "The river froze that winter, and for three weeks no ship could leave the harbour of Rotterdam."


@dataclass(frozen=True)
class Arguments:
    data: Path | None = None
    """Folder of token shards; without a model, a token's entropy is minus the log of its frequency there."""
    model: Path | None = None
    """Folder of a masked language model for transformers, such as an exported run, whose entropies are shown."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; by default that of the model, or of the data."""
    sentence: tuple[str, ...] = (SENTENCE,)
    """Sentences to mask."""
    signal: Literal["clean", "masked"] = "masked"
    """Whether the model sees the token it is asked for (clean) or [MASK] in its place (masked); with a model alone."""
    ratio: float = 0.3
    """Share of the tokens that are masked."""
    score: EntropyScoreConfig = field(default_factory=lambda: EntropyScoreConfig(temperature=0.0))
    """How entropy decides; each strategy is shown."""
    seed: int = 0
    """Of the noise."""

    def problems(self) -> list[str]:
        """Sentences for what is wrong."""
        found = self.score.problems("score")
        if self.score.strategy != "high":
            found.append("`score.strategy` has no effect: each strategy is shown. Remove it.")
        if not 0 < self.ratio < 1:
            found.append(must("ratio", "lie in (0, 1)", self.ratio))
        if self.data is None and self.model is None:
            found.append("Entropies come from `data` (frequency) or from `model`: name one of them.")
        if self.data is not None and self.model is not None:
            found.append("`data` has no effect beside `model`, which has a tokenizer and entropies. Remove one.")
        if self.model is None and self.signal != "masked":
            found.append("`signal` has no effect without `model`. Remove it.")
        return found


@entry_point.command
def main(args: list[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, description=__doc__, args=args)
    raise_all(ConfigError, arguments.problems())
    shown(arguments, Console(highlight=False))
    return 0


def shown(arguments: Arguments, console: Console) -> None:
    """Print each sentence under each way to mask it."""
    from megamask.analysis import show_masks  # here, so that --help need not wait for torch
    from megamask.data import tokenizer as tokenizers
    from megamask.data.shards import Shards

    shards = Shards.open(arguments.data) if arguments.data else None
    default = arguments.model or (arguments.data / tokenizers.TOKENIZER if arguments.data else None)
    tokenizer = tokenizers.load_tokenizer(arguments.tokenizer or str(default))
    for text in arguments.sentence:
        sentence = show_masks.Sentence.of(text, tokenizer)
        entropy = _entropy(arguments, shards, sentence)
        for line in show_masks.render_masks(
            sentence, entropy, ratio=arguments.ratio, score=arguments.score, seed=arguments.seed, width=console.width
        ):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)


def _entropy(arguments: Arguments, shards: Shards | None, sentence: show_masks.Sentence) -> Tensor:
    """The entropy at each row of the sentence."""
    import torch

    from megamask.hf.predictions import sentence_entropies
    from megamask.training.validation import unigram_nll

    tokens = sentence.batch.tokens
    if shards is None:
        assert arguments.model is not None
        return sentence_entropies(arguments.model, tokens, sentence.ids.mask, arguments.signal)
    unigram = unigram_nll(torch.from_numpy(shards.unigram))
    if len(unigram) != sentence.ids.size:
        raise ConfigError(
            f"`tokenizer` has {sentence.ids.size} tokens, but the data were made with one of {len(unigram)}. "
            "Leave it out to take the data's own."
        )
    return unigram[tokens]


if __name__ == "__main__":
    entry_point.run(main)
