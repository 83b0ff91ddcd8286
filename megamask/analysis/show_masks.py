"""Show a sentence under every way to mask it: tokens, marks under the masked ones, and the entropy of each token.

The text is styled (rich) and reads as well without colors: the marks say the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Float
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from torch import Tensor

from megamask.analysis.settings import ShowMasksConfig
from megamask.batch import Layout, MaskPlan, PackedBatch, TokenIds
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer, token_ids
from megamask.data.word_boundaries import encode_with_word_starts
from megamask.entropy.frequency import unigram_surprisal
from megamask.errors import ConfigError, must
from megamask.hf.predictions import sentence_entropies
from megamask.masking.corrupt import Corruption
from megamask.masking.entropy import EntropyScoreConfig, Strategy
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.masking.units import Unit
from megamask.schedules import Schedule

MASKED, DIM = "bold black on yellow", "dim"
MARK = "^"


@dataclass(frozen=True)
class Sentence:
    """A sentence as a pack, and how each of its tokens is written."""

    batch: PackedBatch
    words: list[str]
    ids: TokenIds

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer) -> Sentence:
        """The tokens of ``text``. Those that continue a word are written with ## before them.

        Raises ConfigError if the tokenizer does not show where words begin.
        """
        ids = token_ids(tokenizer)
        [(tokens, begins)] = encode_with_word_starts(tokenizer, [text])
        row = torch.tensor([ids.cls, *tokens.tolist(), ids.sep])
        maskable = ~torch.isin(row, torch.tensor(ids.special))
        starts = torch.cat([torch.tensor([True]), torch.from_numpy(begins), torch.tensor([True])]) | ~maskable
        starts[1] = True
        written = [_written(int(token), bool(start), tokenizer) for token, start in zip(row, starts, strict=True)]
        layout = Layout.of(torch.tensor([0, len(row)]), len(row), len(row))
        return cls(PackedBatch(0, row, layout, starts, maskable), written, ids)


def _written(token: int, starts: bool, tokenizer: Tokenizer) -> str:
    """The text of a token; as the vocabulary spells it if it is blank or not a whole character."""
    text = tokenizer.decode([token]).strip()
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = str(tokenizer.backend.id_to_token(token))
    return text if starts or text.startswith("##") else f"##{text}"


def masking_variants(ratio: float, score: EntropyScoreConfig) -> Iterator[tuple[str, MaskingConfig]]:
    """Random masking and every strategy, with every unit: no random share, every target becomes [MASK]."""
    for unit in get_args(Unit):
        hide = Corruption(1.0, 0.0, 0.0)
        yield f"random, unit {unit}", MaskingConfig(Schedule(start=ratio), unit, "uniform", hide)
        for strategy in get_args(Strategy):
            # `proportional` needs a temperature; 1 is its plain meaning
            temperature = score.temperature or float(strategy == "proportional")
            entropy = replace(score, strategy=strategy, temperature=temperature)
            yield (
                f"strategy {strategy}, unit {unit}",
                MaskingConfig(
                    Schedule(start=ratio), unit, "entropy", hide, entropy=entropy, random_share=Schedule(start=0.0)
                ),
            )


def render_masks(
    sentence: Sentence, entropy: Float[Tensor, " T"], *, ratio: float, score: EntropyScoreConfig, seed: int, width: int
) -> Iterator[Text]:
    """The lines of the sentence under each of `masking_variants`, at most ``width`` cells wide if the tokens allow it.

    The ratio is a share of the tokens that can be masked; at least one is masked.
    """
    rows = int(sentence.batch.maskable.sum())
    for name, config in masking_variants(ratio, score):
        masker = Masker(config, sentence.ids)
        plan = masker(sentence.batch, progress=0.0, rng=PackRng(seed, 0), entropy=entropy, rows=rows)
        yield Text(f"{name}: {len(plan.targets)} of {rows} tokens masked", style="bold")
        yield from _lines(sentence, entropy, plan, width)
        yield Text()


def _lines(sentence: Sentence, entropy: Float[Tensor, " T"], plan: MaskPlan, width: int) -> Iterator[Text]:
    """Tokens, marks and entropies in columns, as many per line as fit."""
    masked = torch.zeros_like(sentence.batch.maskable).index_fill_(0, plan.targets, True)
    numbers = [f"{value:.1f}" if known else "" for value, known in zip(entropy, sentence.batch.maskable, strict=True)]
    columns = [max(cell_len(word), len(number)) + 1 for word, number in zip(sentence.words, numbers, strict=True)]
    for places in _broken(columns, width):
        words, marks, entropies = Text(), Text(), Text()
        for place in places:
            word, cells = sentence.words[place], columns[place]
            words.append(word, MASKED if masked[place] else "").append(" " * (cells - cell_len(word)))
            marks.append((MARK * cell_len(word) if masked[place] else "").ljust(cells))
            entropies.append(numbers[place].ljust(cells), DIM)
        for line in (words, marks, entropies):
            line.rstrip()
            yield line


def _broken(columns: list[int], width: int) -> Iterator[list[int]]:
    """The indices of the columns on each line."""
    line: list[int] = []
    for place, column in enumerate(columns):
        if line and sum(columns[n] for n in line) + column > width:
            yield line
            line = []
        line.append(place)
    yield line


def show_masks(config: ShowMasksConfig) -> None:
    """`megamask show-masks`: print each sentence under every way to mask it."""
    if config.model and not config.model.is_dir():
        raise ConfigError(must("model", "be a folder", str(config.model)))
    shards = Shards.open(config.data) if config.data else None
    default = config.model or (config.data / TOKENIZER if config.data else None)
    tokenizer = load_tokenizer(config.tokenizer or str(default))
    console = Console(highlight=False)
    source = f"predicted by {config.model}" if config.model else "-log of its frequency in the data"
    console.print(f"Masked tokens are marked with {MARK}. Below each token: its entropy in nats ({source}).\n")
    for text in config.sentence:
        sentence = Sentence.of(text, tokenizer)
        entropy = _entropy(config, shards, sentence)
        for line in render_masks(
            sentence, entropy, ratio=config.ratio, score=config.score, seed=config.seed, width=console.width
        ):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)


def _entropy(config: ShowMasksConfig, shards: Shards | None, sentence: Sentence) -> Float[Tensor, " T"]:
    """The entropy at each token of the sentence."""
    tokens = sentence.batch.tokens
    if shards is None:
        assert config.model is not None
        return sentence_entropies(config.model, tokens, sentence.ids.mask, config.signal)
    unigram = unigram_surprisal(torch.from_numpy(shards.unigram))
    if len(unigram) != sentence.ids.size:
        raise ConfigError(
            f"`tokenizer` has {sentence.ids.size} tokens, but the data were made with a tokenizer of {len(unigram)}. "
            "Remove it: the tokenizer of the data is the default."
        )
    return unigram[tokens]
