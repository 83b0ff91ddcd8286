"""A small tokenizer, models that fit it, and folders as transformers saves them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from megamask.data import tokenizer as tokenizers
from megamask.data import tokenizer_training
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.objectives.mlm import MLM
from tests.unit.hf.models import TEXTS

SMALL = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "max_positions": 80}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_training.train_tokenizer("wordpiece", TEXTS * 5, size=90).save(folder)
    return folder


@pytest.fixture
def make(tokenizer):
    """Makes an MLM for the tokenizer with random values in every tensor."""
    ids = tokenizers.token_ids(tokenizers.load_tokenizer(tokenizer))

    def make(preset, dtype=torch.float32, **settings):
        config = ModelConfig(preset=preset, init_std=0.2, **{**SMALL, **settings})
        encoder = Encoder(config.shape(ids), config)
        model = MLM(encoder, MaskedLMHead(encoder, config)).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model

    return make


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Saves a model of transformers with the tokenizer; returns the folder."""

    def save(model, name="saved"):
        folder = tmp_path / name
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        return folder

    return save
