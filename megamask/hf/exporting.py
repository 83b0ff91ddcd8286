"""Export: a folder that ``from_pretrained`` loads, published only if it computes what the original does.

Takes both models in 32 bits in a CPU's memory, one after the other, and a second or so for a small model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from megamask import files
from megamask.batch import Layout
from megamask.errors import CheckpointError, ConfigError, StorageError, must, raise_all
from megamask.hf import library
from megamask.hf.names import DECODER, EMBEDDING, TOKENIZER_FILES, WEIGHTS, bare, misfits, to_theirs
from megamask.hf.settings import write_config
from megamask.model.encoder import Encoder
from megamask.model.head import Head
from megamask.model.shape import EncoderShape

TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit, at which an export is published."""
SENTENCES = (
    "The capital of France is Paris.",
    "She opened the old book and began to read aloud, slowly at first, then faster, until nobody in the room moved.",
    "Water boils at 100 degrees.",
)


@dataclass(frozen=True)
class Card:
    """What the model card says of where a model comes from."""

    name: str
    """Title of the card."""
    recipe: str
    """Name of the recipe, or the settings in words."""
    steps: int
    """Steps of training."""
    data: str
    """Hash of the text and tokenizer it was trained on."""
    notes: str = ""
    """Anything else, in Markdown."""


def export_model(
    weights: Mapping[str, Tensor], shape: EncoderShape, tokenizer_folder: Path, output: Path, *, card: Card
) -> float:
    """Write what ``from_pretrained`` loads to ``output`` and return the largest difference of logits found.

    ``weights`` are an objective's, by name; parts beside encoder and head are left out. An earlier export at
    ``output`` is replaced; any other folder that is not empty is refused. Raises CheckpointError, with nothing
    written, if the model that transformers loads does not compute what ours does.
    """
    weights = {name: tensor for name, tensor in weights.items() if name.startswith(("encoder.", "head."))}
    weights.pop(DECODER, None)
    raise_all(CheckpointError, misfits(weights, shape, "the model to be exported"))
    raise_all(ConfigError, _obstacles(output))
    output = Path(os.path.abspath(output))
    temporary = output.with_name(f".tmp-{output.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        tokenizer = _write_tokenizer(tokenizer_folder, temporary, shape)
        write_config(shape, tokenizer, temporary)
        save_file(to_theirs(weights, shape), temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / "README.md").write_text(_render(card, shape))
        difference = _compare(weights, shape, temporary, tokenizer)
        if output.exists():
            shutil.rmtree(output)
        os.rename(temporary, output)
        files.sync(output.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # of transformers, not of the disk
        raise StorageError(f"{output} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def _obstacles(output: Path) -> list[str]:
    ours = {WEIGHTS, "config.json", "README.md", *TOKENIZER_FILES}
    if not output.exists():
        return []
    if not output.is_dir():
        return [must("output", "be a folder", str(output))]
    strange = sorted(set(os.listdir(output)) - ours)
    if strange:
        return [f"`output` is {output}, which holds {strange[0]}, so it is no earlier export. Choose another folder."]
    return []


def _write_tokenizer(source: Path, target: Path, shape: EncoderShape) -> library.PreTrainedTokenizerBase:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    path = target / "tokenizer_config.json"
    if not path.is_file() or not (target / "tokenizer.json").is_file():
        raise CheckpointError(f"{source} holds no tokenizer.json with its tokenizer_config.json.")
    # else pipelines would pass on texts longer than the model can take
    settings = json.loads(path.read_text())
    settings["model_max_length"] = min(settings.get("model_max_length", shape.max_positions), shape.max_positions)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    try:
        tokenizer = library.load_tokenizer(target)
    except library.Unloadable as error:
        raise CheckpointError(f"The tokenizer in {source} cannot be loaded by transformers: {error.why}") from None
    if len(tokenizer) > shape.vocab_size:
        raise CheckpointError(
            f"The tokenizer in {source} has {len(tokenizer)} tokens, but the model only {shape.vocab_size}: "
            "they do not belong together."
        )
    return tokenizer


def _render(card: Card, shape: EncoderShape) -> str:
    kind = "BertForMaskedLM" if shape.preset == "bert" else "ModernBertForMaskedLM"
    millions = sum(p.numel() for p in bare(shape).parameters()) / 1e6
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
| recipe | {card.recipe} |
| steps | {card.steps} |
| text and tokenizer (sha256) | `{card.data}` |

```python
from transformers import pipeline

print(pipeline("fill-mask", "PATH OF THIS FOLDER")("..."))
```
{card.notes}"""


@torch.no_grad()
def _compare(weights: Mapping[str, Tensor], shape: EncoderShape, folder: Path, tokenizer) -> float:
    sequences = _random_input(shape) + _real_input(tokenizer, shape)
    ours = _our_logits(weights, shape, sequences)
    theirs = _their_logits(folder, sequences, shape.pad_id)
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    largest = max(1.0, max(logits.abs().max().item() for logits in ours))
    if not difference <= TOLERANCE * largest:  # so written that NaN is refused
        raise CheckpointError(
            f"transformers computes logits that differ from ours by {difference:.3g} (the largest is {largest:.3g}), "
            f"so nothing was written. The weights may hold numbers that are not finite, or this is a bug."
        )
    return difference


def _random_input(shape: EncoderShape) -> list[Tensor]:
    """Sequences of several lengths, one longer than a local window where there are such layers."""
    draws = torch.Generator().manual_seed(0)
    longest = min(shape.max_positions, max(96, shape.local_window + 32 if shape.global_every > 1 else 0))
    lengths = sorted({1, 2, longest // 3, longest} - {0})
    return [torch.randint(shape.vocab_size, (length,), generator=draws) for length in lengths]


def _real_input(tokenizer: library.PreTrainedTokenizerBase, shape: EncoderShape) -> list[Tensor]:
    """A few sentences, each with a word masked."""
    found = []
    for sentence in SENTENCES:
        ids = tokenizer(sentence, truncation=True, max_length=shape.max_positions, return_tensors="pt")["input_ids"][0]
        ids[len(ids) // 2] = tokenizer.mask_token_id
        found.append(ids)
    return found


def _our_logits(weights: Mapping[str, Tensor], shape: EncoderShape, sequences: list[Tensor]) -> list[Tensor]:
    model = bare(shape)
    wide = {name: tensor.float() for name, tensor in weights.items()}
    model.load_state_dict(wide | {DECODER: wide[EMBEDDING]}, assign=True)
    model.eval()
    lengths = [len(sequence) for sequence in sequences]
    layout = Layout(
        torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), torch.cat([torch.arange(n) for n in lengths]).int()
    )
    encoder, head = model["encoder"], model["head"]
    assert isinstance(encoder, Encoder) and isinstance(head, Head)
    states = encoder.run(encoder.embed(torch.cat(sequences), layout), layout)
    return list(head.logits(states).split(lengths))


def _their_logits(folder: Path, sequences: list[Tensor], pad: int) -> list[Tensor]:
    model, report = library.load_model(library.AutoModelForMaskedLM, folder)
    wrong = {key: found for key, found in report.items() if found}
    if wrong:
        raise CheckpointError(f"transformers did not find in the export what it looks for: {wrong}.")
    model.eval()
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
    present = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=padded, attention_mask=present).logits
    return [row[:length] for row, length in zip(logits, lengths.tolist(), strict=True)]
