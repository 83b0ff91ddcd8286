"""The text on which encoders are compared: packs of shards or of raw text, each with a seeded uniform mask."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamask.batch import MaskPlan, PackedBatch
from megamask.data import tokenizer as tokenizers
from megamask.data.compare_tokenizers import tokenizer_differences
from megamask.data.packs import Packs
from megamask.data.prepare import prepare
from megamask.data.settings import PrepareConfig
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER
from megamask.errors import DataError, raise_all
from megamask.masking.corrupt import Corruption
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.schedules import Schedule

PURPOSE = "rank"
SEQUENCES = 8
"""How many sequences of the largest length fit into a pack."""


def training_data(run: Path) -> Path | None:
    """The shards on which a run (or the run of a checkpoint) was trained; None if it does not say."""
    for folder in (run, run.absolute().parent.parent):
        try:
            config = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and isinstance(config.get("data"), str):
            return Path(config["data"])
    return None


def open_held_out(data: Path, tokenizer: Path, name: str) -> Shards:
    """The validation split of ``data``; DataError if its tokenizer is not ``tokenizer``, that of the model ``name``."""
    shards = Shards.open(data, "valid")
    raise_all(DataError, tokenizer_differences(tokenizer, name, shards.folder / TOKENIZER, f"the data in {data}"))
    return shards


def prepare_raw(text: Path, tokenizer: Path, folder: Path) -> Shards:
    """The file ``text`` as shards in ``folder``, in the tokens of ``tokenizer``, prepared like text for training."""
    output = prepare(PrepareConfig((str(text),), folder, str(tokenizer), valid_share=0.0, workers=1))
    return Shards.open(output, "train")


def batches(shards: Shards, tokens: int, length: int, seed: int) -> list[PackedBatch]:
    """An even number of packs, in an order drawn with ``seed``, with at least ``tokens`` tokens of text.

    Raises DataError if the text has fewer.
    """
    packs = Packs(shards, tokens=SEQUENCES * length, length=length, seed=seed)
    chosen: list[PackedBatch] = []
    count = 0
    for number in range(len(packs)):
        if count >= tokens and len(chosen) % 2 == 0:
            return chosen
        chosen.append(packs.batch(number))
        count += int(chosen[-1].maskable.sum())
    if count >= tokens and len(chosen) % 2 == 0:
        return chosen
    raise DataError(
        f"`tokens` is {tokens:,}, to be read in two halves of whole packs, but the {shards.split} split of "
        f"{shards.folder} has {count:,} tokens in {len(chosen)} packs of {SEQUENCES * length:,} positions. Lower "
        "`tokens` or `length`, or use more text."
    )


def mask_batches(
    batches: Sequence[PackedBatch], shards: Shards, ratio: float, seed: int
) -> Iterator[tuple[PackedBatch, MaskPlan]]:
    """Each pack with its plan: ``ratio`` of its tokens of text, drawn uniformly, all replaced by [MASK]."""
    config = MaskingConfig(Schedule(start=ratio), "token", "uniform", Corruption(1.0, 0.0, 0.0))
    masker = Masker(config, shards.token_ids)
    for batch in batches:
        rng, maskable = PackRng(seed, batch.number, PURPOSE), int(batch.maskable.sum())
        yield batch, masker(batch, progress=0.0, rng=rng, rows=maskable)


def too_few_tokens(tokens: int, ratio: float, width: int) -> list[str]:
    """A sentence if half the text has fewer [MASK] than there are dimensions: then their number limits the rank."""
    if int(tokens * ratio / 2) >= width:
        return []
    needed = -(-2 * width // ratio)
    return [
        f"`tokens` must be at least {needed:,.0f} for a width of {width} and a `ratio` of {ratio}, but is {tokens:,}: "
        "each half of the text needs as many [MASK] tokens as there are dimensions."
    ]


def vocabulary_problems(tokenizer: Path, vocabulary: int, name: str) -> list[str]:
    """A sentence if the token table of the model ``name`` has fewer rows than ``tokenizer`` has tokens."""
    size = tokenizers.load_tokenizer(tokenizer).size
    if size <= vocabulary:
        return []
    return [
        f"{name} has an embedding of {vocabulary} tokens, but its tokenizer in {tokenizer} has {size} tokens: they do "
        "not belong together."
    ]
