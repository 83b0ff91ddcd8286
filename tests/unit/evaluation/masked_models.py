"""Folders of small random models of transformers, with a tokenizer that learned a few sentences."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from megamask.data import tokenizer_training
from megamask.data.tokenizer import Tokenizer
from megamask.evaluation.encoder import EncoderFolder

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs and some water.",
    "What could a lot of cats break while finding all convertibles?",
]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
FAMILIES = ("bert", "modern", "roberta")
"""BERT and ModernBERT run in our encoder, RoBERTa in transformers; ModernBERT and RoBERTa take no second token type."""


def small_tokenizer() -> Tokenizer:
    """A WordPiece tokenizer that splits most words of `SENTENCES` into pieces."""
    return tokenizer_training.train_tokenizer("wordpiece", SENTENCES * 5, size=90)


def save_model(family: str, tokenizer: Tokenizer, folder: Path) -> EncoderFolder:
    """A random model of the ``family`` in ``folder``, with values other than 0 and 1 in every tensor."""
    common = {**SIZES, "vocab_size": tokenizer.size, "pad_token_id": 0, "initializer_range": 0.3}
    common |= {"max_position_embeddings": 64}
    if family == "modern":
        ids = dict.fromkeys(("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id"))
        model = ModernBertForMaskedLM(ModernBertConfig(**common, **ids, local_attention=8))
    elif family == "roberta":
        model = RobertaForMaskedLM(RobertaConfig(**common, type_vocab_size=1))
    else:
        model = BertForMaskedLM(BertConfig(**common))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return EncoderFolder(family, folder, "", 64)
