"""The model card of an export, and the record beside it that says which run made it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from megamask.data.tokenizer import Tokenizer
from megamask.hf.tensor_names import WEIGHTS, bare
from megamask.model.shape import EncoderShape
from megamask.storage import durable, strict_json

CARD, RECORD = "README.md", "megamask.json"


@dataclass(frozen=True)
class Card:
    """What is said of where a model comes from."""

    name: str
    """Title of the card."""
    recipe: str
    """Name of the recipe, or the settings in words."""
    steps: int
    """Steps of training."""
    data: str
    """Hash of the text and tokenizer it was trained on."""
    facts: dict[str, str] = field(default_factory=dict)
    """More rows of the card's table: size of the text, validation loss, date."""
    knows_mask: bool = True
    """Whether the exported model predicts at [MASK]; else the card shows how to fine-tune it."""
    notes: str = ""
    """Anything else, in Markdown."""
    run: str = ""
    """The name of the run's first launch. An export is replaced only by an export of the same run."""


def render_card(card: Card, shape: EncoderShape, tokenizer: Tokenizer) -> str:
    """The card in Markdown."""
    kind = "BertForMaskedLM" if shape.preset == "bert" else "ModernBertForMaskedLM"
    millions = sum(p.numel() for p in bare(shape).parameters()) / 1e6
    rows = {"recipe": card.recipe, "steps": f"{card.steps}", **card.facts}
    rows["text and tokenizer (sha256)"] = f"`{card.data}`"
    table = "\n".join(f"| {name} | {said} |" for name, said in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags:
- megamask
---

# {card.name}

A masked language model pretrained with megamask. {kind}, {millions:.1f} million parameters: {shape.num_layers} layers
of width {shape.hidden_size}, {shape.num_heads} heads, {shape.vocab_size} tokens, sequences up to
{shape.max_positions} tokens.

| | |
|---|---|
{table}

```python
{_fill(tokenizer) if card.knows_mask else FINE_TUNE}
```
{card.notes}"""


FINE_TUNE = """from transformers import AutoModelForSequenceClassification

# pretrained without [MASK] in its input: fine-tune it for your task
model = AutoModelForSequenceClassification.from_pretrained("PATH OF THIS FOLDER")"""


def _fill(tokenizer: Tokenizer) -> str:
    mask, unknown = tokenizer.roles["mask"], tokenizer.roles.get("unk")
    begin, end = "The capital of France is ", "."
    unknown_id = tokenizer.backend.token_to_id(unknown) if unknown else None
    if unknown_id in tokenizer.encode([begin])[0]:  # English is no text for this tokenizer
        begin = end = ""
    return f"""from transformers import pipeline

fill = pipeline("fill-mask", "PATH OF THIS FOLDER")
print(fill({begin + mask + end!r}))"""


def write_record(card: Card, folder: Path) -> None:
    """Write down which run made the export in ``folder``, and the hash of its weights."""
    record = {"run": card.run, "steps": card.steps, "weights": durable.sha256(folder / WEIGHTS)}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def is_of_run(folder: Path, run: str) -> bool:
    """Whether ``folder`` holds an export of ``run`` as megamask wrote it."""
    try:
        record = strict_json.read_json(folder / RECORD)
        return bool(run) and record["run"] == run and record["weights"] == durable.sha256(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError):
        return False
