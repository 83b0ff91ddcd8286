"""Settings of `megamask import` and `megamask export`, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImportConfig:
    """Turn a checkpoint of transformers into initial weights for `megamask pretrain --init`.

    BERT, ModernBERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ALBERT, and the generator of ELECTRA.
    """

    model: str
    """Folder of a model of transformers, or its name on the Hugging Face Hub."""
    output: Path
    """New folder for weights, shape and tokenizer."""
    new_head: bool = False
    """Import the encoder alone: training starts with a new masked-language-model head."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint of a run as a model for transformers, after comparing the logits of both."""

    run: Path
    """Folder of the run."""
    output: Path
    """Folder to write; an earlier export of the same run is replaced."""
    step: int | None = None
    """Step of the checkpoint; the newest if not given."""
    replace: bool = False
    """Also replace an export of another run, or one that was changed since."""
