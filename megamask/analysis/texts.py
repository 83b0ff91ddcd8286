"""The text that encoders are compared on: packs of shards or of raw text, each with a seeded uniform mask."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamask.batch import MaskPlan, PackedBatch
from megamask.data import tokenizer as tokenizers
from megamask.data.compare_tokenizers import tokenizer_differences
from megamask.data.packs import Packs
from megamask.data.prepare import PrepareConfig, prepare
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER
from megamask.errors import DataError, raise_all
from megamask.masking.corrupt import Corruption
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.schedules import Schedule

PURPOSE = "rank"
SEQUENCES = 8
"""How many of the longest sequences a pack has room for."""


def data_of(run: Path) -> Path | None:
    """The shards that a run (or the run of a checkpoint) was trained on; None if it does not say."""
    for folder in (run, run.absolute().parent.parent):
        try:
            said = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(said, dict) and isinstance(said.get("data"), str):
            return Path(said["data"])
    return None


def held_out(data: Path, tokenizer: Path, name: str) -> Shards:
    """The validation split of ``data``; DataError if its tokenizer is not ``tokenizer``, that of the model ``name``."""
    shards = Shards.open(data, "valid")
    raise_all(DataError, tokenizer_differences(tokenizer, name, shards.folder / TOKENIZER, f"the data in {data}"))
    return shards


def from_raw(text: Path, tokenizer: Path, folder: Path) -> Shards:
    """The file ``text`` as shards in ``folder``, in the tokens of ``tokenizer``; prepared as any text for training."""
    made = prepare(PrepareConfig((str(text),), folder, str(tokenizer), valid_share=0.0, workers=1))
    return Shards.open(made, "train")


def batches(shards: Shards, tokens: int, length: int, seed: int) -> list[PackedBatch]:
    """Packs in an order drawn by ``seed``, an even number of them, with at least ``tokens`` tokens of text.

    Raises DataError if the text has fewer.
    """
    packs = Packs(shards, tokens=SEQUENCES * length, length=length, seed=seed)
    found: list[PackedBatch] = []
    held = 0
    for number in range(len(packs)):
        if held >= tokens and len(found) % 2 == 0:
            return found
        found.append(packs.batch(number))
        held += int(found[-1].maskable.sum())
    if held >= tokens and len(found) % 2 == 0:
        return found
    raise DataError(
        f"`tokens` asks for {tokens:,} tokens in two halves of whole packs, but the {shards.split} split of "
        f"{shards.folder} fills {len(found)} packs of {SEQUENCES * length:,} rows with {held:,}. Lower `tokens` or "
        "`length`, or give more text."
    )


def masked(
    texts: Sequence[PackedBatch], shards: Shards, ratio: float, seed: int
) -> Iterator[tuple[PackedBatch, MaskPlan]]:
    """Each pack with its plan: ``ratio`` of the tokens of its text, drawn uniformly, all replaced by [MASK]."""
    config = MaskingConfig(Schedule(start=ratio), "token", "uniform", Corruption(1.0, 0.0, 0.0))
    masker = Masker(config, shards.token_ids)
    for batch in texts:
        yield (
            batch,
            masker(batch, progress=0.0, rng=PackRng(seed, batch.number, PURPOSE), rows=int(batch.maskable.sum())),
        )


def enough(tokens: int, ratio: float, width: int) -> list[str]:
    """A sentence if each half has fewer rows of [MASK] than dimensions: then the rows set the rank, not the model."""
    if int(tokens * ratio / 2) >= width:
        return []
    needed = -(-2 * width // ratio)
    return [
        f"`tokens` must be at least {needed:,.0f} for a width of {width} and a `ratio` of {ratio}, but is {tokens:,}: "
        "each half of the text needs as many rows of [MASK] as there are dimensions."
    ]


def same_tokens(tokenizer: Path, vocabulary: int, name: str) -> list[str]:
    """A sentence if the model ``name`` has fewer rows in its table than ``tokenizer`` has tokens."""
    size = tokenizers.load_tokenizer(tokenizer).size
    if size <= vocabulary:
        return []
    return [
        f"{name} has {vocabulary} rows in its embedding, but its tokenizer in {tokenizer} has {size} tokens; they do "
        "not belong together."
    ]
