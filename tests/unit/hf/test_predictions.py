"""Predictions of a model of transformers: folders that cannot give them are refused."""

from __future__ import annotations

import json

import pytest
import torch

from megamask.errors import CheckpointError
from megamask.hf.masked_lm import load_hf_masked_lm
from megamask.hf.predictions import sentence_entropies
from tests.unit.hf.models import transformers_model


def test_impossible_sizes_are_a_sentence_for_sentence_entropies(saved):
    folder = saved(transformers_model("bert"))
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2**53}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{folder}/config.json does not describe .*: num_hidden_layers is"):
        sentence_entropies(folder, torch.tensor([1, 2]), 3, "clean")


@pytest.mark.parametrize(
    "reads", [load_hf_masked_lm, lambda folder: sentence_entropies(folder, torch.tensor([1, 2]), 3, "clean")]
)
def test_an_encoder_without_a_head_gives_no_predictions(saved, reads, capfd):
    folder = saved(transformers_model("bert").bert)
    capfd.readouterr()
    with pytest.raises(CheckpointError, match=r"does not hold a complete BertForMaskedLM: it lacks \d+ tensors"):
        reads(folder)
    assert not any(capfd.readouterr())
