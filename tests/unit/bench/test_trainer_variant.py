"""The two forms of the example's input, and that both sides train the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForMaskedLM

from megamask.batch import TokenIds
from megamask.bench.settings import BenchConfig
from megamask.bench.trainer_variant import (
    bench_documents,
    bert_config,
    concatenated,
    one_device_arguments,
    trainer_variants,
    truncated,
)
from megamask.data.shards import Shards
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.objectives.mlm import MLM

IDS = TokenIds(size=50, cls=1, sep=2, pad=0, mask=3, special=(0, 1, 2, 3))
texts = st.lists(st.lists(st.integers(4, 49), max_size=40).map(lambda ids: np.array(ids, np.int64)), max_size=8)


@given(texts, st.integers(8, 20))
def test_concatenated_blocks_are_full_and_lose_only_the_end(given_texts, length):
    blocks = list(concatenated(given_texts, IDS, length))
    whole = [i for one in given_texts for i in [IDS.cls, *one.tolist(), IDS.sep]]
    assert [i for block in blocks for i in block.tolist()] == whole[: len(whole) // length * length]
    assert all(len(block) == length for block in blocks)


@given(texts, st.integers(8, 20))
def test_every_padded_text_is_a_truncated_sequence(given_texts, length):
    sequences = list(truncated(given_texts, IDS, length))
    assert len(sequences) == len(given_texts)
    for one, sequence in zip(given_texts, sequences, strict=True):
        assert sequence.tolist() == [IDS.cls, *one.tolist()[: length - 2], IDS.sep]


@pytest.mark.parametrize("dropout", [None, 0.0])
def test_both_sides_have_the_same_weights(dropout):
    config = BenchConfig(dropout=dropout)
    model = config.model("bert")
    shape = model.shape(IDS)
    trainer_model = BertForMaskedLM(bert_config(shape, dropout))
    encoder = Encoder(shape, model)
    megamask_model = MLM(encoder, MaskedLMHead(encoder, model))
    count = [sum(p.numel() for p in side.parameters()) for side in (trainer_model, megamask_model)]
    assert count[0] == count[1]
    assert trainer_model.config.hidden_dropout_prob == (0.1 if dropout is None else dropout)


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_the_trainer_uses_one_gpu_of_several(gpus, tmp_path) -> None:
    arguments = one_device_arguments()(str(tmp_path), use_cpu=True, per_device_train_batch_size=32)
    arguments._n_gpu = gpus  # as transformers finds them
    assert arguments.n_gpu == min(gpus, 1) and arguments.train_batch_size == 32


def test_each_trainer_keeps_its_precision_and_only_one_is_compiled(text: Path) -> None:
    """accelerate has one state for all of them."""
    config = BenchConfig(size="tiny", length=32, pack_tokens=64, rounds=1, steps=1, compile=True)
    shards = Shards.open(text)
    variants = trainer_variants(config, shards, bench_documents(shards), ["bf16", "fp32"])
    compiled = type(torch.compile(torch.nn.Identity()))
    with torch.compiler.set_stance("force_eager"):
        for variant in [*variants, *variants]:
            variant.run(1)
            trainer = variant._trainer
            assert isinstance(trainer.model_wrapped, compiled) == variant.name.endswith(", compiled")
            assert (trainer.accelerator.state.mixed_precision == "bf16") == ("bf16" in variant.name)
