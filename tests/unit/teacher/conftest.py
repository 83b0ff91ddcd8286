"""Teachers and students for tests of this package."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megamask.data import tokenizer as tokenizers
from megamask.hf.tensor_names import WEIGHTS
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.objectives.mlm import MLM
from megamask.teacher.teacher import Teacher, TeacherConfig
from tests.batches import pack
from tests.unit.teacher.models import FULL, LENGTHS, SIZES, plan_of, randomise


@pytest.fixture
def packs(ids):
    """Packs with padding at the end, and plans that hide every third token."""
    batches = [pack(n, padding=4, number=k, seed=k, ids=ids) for k, n in enumerate(LENGTHS)]
    return batches, [plan_of(batch, ids) for batch in batches]


@pytest.fixture
def student(ids):
    def make(preset="modern", **settings) -> MLM:
        config = ModelConfig(preset, init_std=0.2, **{**SIZES, **settings})
        encoder = Encoder(config.shape(ids), config)
        model = MLM(encoder, MaskedLMHead(encoder, config)).eval()
        randomise(model)
        return model

    return make


@pytest.fixture
def first_weights(tmp_path, tokenizer):
    """Saves an MLM of ours as initial weights; returns the folder."""

    def save(model: MLM, name="first") -> Path:
        folder = tmp_path / name
        tokenizers.load_tokenizer(tokenizer).save(folder / "tokenizer")
        model.encoder.shape.save(folder)
        save_file({n: p.detach().clone() for n, p in model.named_parameters()}, folder / WEIGHTS)
        return folder

    return save


@pytest.fixture
def theirs(tmp_path, tokenizer, ids):
    """Saves a small model of transformers with the tokenizer; returns folder and model."""

    def save(kind: str, name="theirs", **changes):
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
        sizes |= {"max_position_embeddings": 64, "embedding_size": 16}
        if kind == "distilbert":
            sizes = {"n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
        special = {"pad_token_id": ids.pad, "bos_token_id": ids.cls, "eos_token_id": ids.sep}
        special |= {"cls_token_id": ids.cls, "sep_token_id": ids.sep}
        config = CONFIG_MAPPING[kind](
            **{"vocab_size": ids.size, "initializer_range": 0.2, **sizes, **special, **changes}
        )
        model = AutoModelForMaskedLM.from_config(config).eval()
        randomise(model)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return save


@pytest.fixture
def load(tokenizer, ids):
    def load(path, distill=FULL, *, length=25, vocab_size=None, **settings) -> Teacher:
        config = TeacherConfig(str(path), **{"precision": "fp32", **settings})
        return Teacher.load(config, distill, tokenizer=tokenizer, ids=ids, length=length, vocab_size=vocab_size)

    return load
