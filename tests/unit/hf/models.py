"""Models with random weights for the tests of import and export, ours and those of transformers."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from megamask.batch import Layout
from megamask.hf import Card

CARD = Card("a test", recipe="random weights", steps=7, data="0123abcd", run="first")
FAMILY_NAMES = ["bert", "modern", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert"]
"""Our presets, and every other `model_type` that is imported."""
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs and some water."]


def weights_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def transformers_model(preset, **changes):
    """A model of transformers with random weights; ``preset`` is one of ours, or a `model_type`."""
    common = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0}
    common |= {"intermediate_size": 48, "max_position_embeddings": 80, "initializer_range": 0.2}
    special = dict.fromkeys(("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id"))
    more = {"distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48}, "electra": {"embedding_size": 16}}
    more["albert"] = {"embedding_size": 16}
    model_type = {"modern": "modernbert"}.get(preset, preset)
    common |= more.get(preset, special if preset == "modern" else {})
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **common | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def packed_logits(model, sequences):
    lengths = [len(sequence) for sequence in sequences]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    layout = Layout(ends, max(lengths), torch.cat([torch.arange(n) for n in lengths]).int())
    states = model.encoder.run(model.encoder.embed(torch.cat(sequences), layout), layout)
    return model.head.logits(states)


def in_64_bits(model, other, sequences):
    """The logits of both in fp64, and the precision of the worse: rotary embeddings of transformers are always fp32."""
    rotary = model.encoder.shape.preset == "modern"
    pair = packed_logits(model.double(), sequences), padded_logits(other.double(), sequences)
    return *pair, torch.float32 if rotary else torch.float64


def padded_logits(model, sequences):
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    present = torch.arange(padded.shape[1]) < torch.tensor([len(sequence) for sequence in sequences])[:, None]
    return model(input_ids=padded, attention_mask=present.long()).logits[present]
