"""The name of each tensor here and in transformers, and the conversion of weights between the two."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megamask.model.shape import EncoderShape

WEIGHTS = "model.safetensors"
EMBEDDING, DECODER = "encoder.embedding.tokens.weight", "head.decoder.weight"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "added_tokens.json",
)  # fmt: skip


def tensor_names(shape: EncoderShape) -> dict[str, tuple[str, ...]]:
    """Our name of each tensor -> the names in transformers, whose tensors are concatenated along dimension 0."""
    table = _bert_names() if shape.preset == "bert" else _modern_names()
    layers = {ours: theirs for ours, theirs in table.items() if "{n}" in ours}
    whole = {ours: theirs for ours, theirs in table.items() if "{n}" not in ours}
    for n in range(shape.num_layers):
        for ours, theirs in layers.items():
            if shape.preset == "modern" and n == 0 and "attention_norm" in ours:
                continue  # their first layer does not have one
            whole[ours.format(n=n)] = tuple(name.format(n=n) for name in theirs)
    return whole


def _bert_names() -> dict[str, tuple[str, ...]]:
    layer = "bert.encoder.layer.{n}"
    modules: dict[str, tuple[str, ...]] = {
        "encoder.embedding.norm": ("bert.embeddings.LayerNorm",),
        "encoder.layers.{n}.qkv": tuple(f"{layer}.attention.self.{part}" for part in ("query", "key", "value")),
        "encoder.layers.{n}.attention_out": (f"{layer}.attention.output.dense",),
        "encoder.layers.{n}.attention_norm": (f"{layer}.attention.output.LayerNorm",),
        "encoder.layers.{n}.mlp_in": (f"{layer}.intermediate.dense",),
        "encoder.layers.{n}.mlp_out": (f"{layer}.output.dense",),
        "encoder.layers.{n}.mlp_norm": (f"{layer}.output.LayerNorm",),
        "head.dense": ("cls.predictions.transform.dense",),
        "head.norm": ("cls.predictions.transform.LayerNorm",),
    }
    return {
        EMBEDDING: ("bert.embeddings.word_embeddings.weight",),
        "encoder.embedding.positions.weight": ("bert.embeddings.position_embeddings.weight",),
        "encoder.embedding.token_types.weight": ("bert.embeddings.token_type_embeddings.weight",),
        "head.decoder.bias": ("cls.predictions.bias",),
        **{
            f"{ours}.{part}": tuple(f"{name}.{part}" for name in theirs)
            for ours, theirs in modules.items()
            for part in ("weight", "bias")
        },
    }


def _modern_names() -> dict[str, tuple[str, ...]]:
    return {
        EMBEDDING: ("model.embeddings.tok_embeddings.weight",),
        "encoder.embedding.norm.weight": ("model.embeddings.norm.weight",),
        "encoder.layers.{n}.attention_norm.weight": ("model.layers.{n}.attn_norm.weight",),
        "encoder.layers.{n}.qkv.weight": ("model.layers.{n}.attn.Wqkv.weight",),
        "encoder.layers.{n}.attention_out.weight": ("model.layers.{n}.attn.Wo.weight",),
        "encoder.layers.{n}.mlp_norm.weight": ("model.layers.{n}.mlp_norm.weight",),
        "encoder.layers.{n}.mlp_in.weight": ("model.layers.{n}.mlp.Wi.weight",),
        "encoder.layers.{n}.mlp_out.weight": ("model.layers.{n}.mlp.Wo.weight",),
        "encoder.final_norm.weight": ("model.final_norm.weight",),
        "head.dense.weight": ("head.dense.weight",),
        "head.norm.weight": ("head.norm.weight",),
        "head.decoder.bias": ("decoder.bias",),
    }


BODY = {"bert": "bert.", "modern": "model."}
"""Prefix of the encoder's tensors in a masked language model of transformers."""
PARTS = {
    "bert": ("embeddings.", "encoder.", "pooler."),
    "modern": ("embeddings.", "layers.", "final_norm."),
}
"""What follows the prefix."""
# parts of a BERT checkpoint that masked language modeling does not use
LEFT_OUT = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids", "bert.embeddings.token_type_ids")


def to_theirs(weights: Mapping[str, Tensor], shape: EncoderShape) -> dict[str, Tensor]:
    """Our weights under the names in transformers."""
    tensors = {}
    for ours, theirs in tensor_names(shape).items():
        for name, chunk in zip(theirs, weights[ours].chunk(len(theirs)), strict=True):
            tensors[name] = chunk.contiguous()
    return tensors


def to_ours(weights: Mapping[str, Tensor], shape: EncoderShape) -> dict[str, Tensor]:
    """Weights of transformers under our names; missing tensors are left out."""
    chunks = {ours: [weights[n] for n in theirs if n in weights] for ours, theirs in tensor_names(shape).items()}
    return {ours: torch.cat(tensors) for ours, tensors in chunks.items() if tensors}
