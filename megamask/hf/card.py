"""The model card of an export, and a record of the run that made it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from megamask.data.tokenizer import Tokenizer
from megamask.hf.encoder_and_head import empty_model
from megamask.hf.families import family_of
from megamask.hf.tensor_names import WEIGHTS
from megamask.model.shape import EncoderShape
from megamask.storage import file_list, strict_json

CARD, RECORD = "README.md", "megamask.json"


@dataclass(frozen=True)
class Card:
    """What a model card says about the origin of a model."""

    name: str
    """Title of the card."""
    recipe: str
    """Name of the recipe, or the settings in words."""
    steps: int
    """Steps of training."""
    data: str
    """Hash of the text and tokenizer of the training."""
    facts: dict[str, str] = field(default_factory=dict)
    """More rows for the table: size of the text, validation loss, date."""
    knows_mask: bool = True
    """Whether the exported model predicts tokens at [MASK]. If not, the example fine-tunes it."""
    notes: str = ""
    """Anything else, in Markdown."""
    run: str = ""
    """The name of the run's first launch. An export is replaced only by an export of the same run."""


FOLDER = "path/to/this/model"
"""What the example of a card has in the place of the model's path."""


def render_card(card: Card, shape: EncoderShape, tokenizer: Tokenizer) -> str:
    """The card in Markdown."""
    kind = family_of(shape).architecture
    millions = sum(p.numel() for p in empty_model(shape).parameters()) / 1e6
    rows = {"recipe": card.recipe, "steps": f"{card.steps:,}", **card.facts}
    rows["text and tokenizer (sha256)"] = f"`{card.data}`"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: {"fill-mask" if card.knows_mask else "feature-extraction"}
tags:
- megamask
---

# {card.name}

An encoder that was pretrained with megamask as a masked language model. {PURPOSE if card.knows_mask else NO_MASK}

## Architecture

`{kind}` with {millions:.1f} million parameters: {shape.num_layers} layers of width {shape.hidden_size},
{shape.num_heads} attention heads, a vocabulary of {shape.vocab_size:,} tokens, and sequences of up to
{shape.max_positions:,} tokens.

## Training

| | |
|---|---|
{table}

## Usage

Replace `{FOLDER}` with the path of this folder, or with the name of the model on the Hugging Face Hub.

```python
{_fill_mask(tokenizer) if card.knows_mask else FINE_TUNE}
```
{card.notes}"""


PURPOSE = "It predicts masked tokens, and can be fine-tuned for classification, tagging or retrieval."
NO_MASK = (
    "It never saw the mask token in pretraining, so it does not predict masked tokens. Fine-tune it for "
    "classification, tagging or retrieval."
)
FINE_TUNE = f"""from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")
model = AutoModelForSequenceClassification.from_pretrained("{FOLDER}", num_labels=2)  # new classifier"""


def _fill_mask(tokenizer: Tokenizer) -> str:
    mask, unknown = tokenizer.roles["mask"], tokenizer.roles.get("unk")
    before, after = "The capital of France is ", "."
    unknown_id = tokenizer.backend.token_to_id(unknown) if unknown else None
    if unknown_id in tokenizer.encode([before])[0]:  # the tokenizer cannot encode English
        before = after = ""
    return f"""from transformers import pipeline

fill_mask = pipeline("fill-mask", model="{FOLDER}")
for prediction in fill_mask({json.dumps(before + mask + after, ensure_ascii=False)}):
    print(f"{{prediction['score']:.3f}}  {{prediction['token_str']}}")"""


def write_record(card: Card, folder: Path) -> None:
    """Record in ``folder`` which run made the export, and the hash of its weights."""
    record = {"run": card.run, "steps": card.steps, "weights": file_list.sha256(folder / WEIGHTS)}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def is_of_run(folder: Path, run: str) -> bool:
    """Whether ``folder`` contains an export of ``run`` that was not changed since."""
    try:
        record = strict_json.read_json(folder / RECORD)
        return bool(run) and record["run"] == run and record["weights"] == file_list.sha256(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError):
        return False
