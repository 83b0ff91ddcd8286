"""The name of each tensor here and in transformers, and the conversion of weights between the two."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megamask.hf.families import family_of
from megamask.model.shape import EncoderShape

WEIGHTS = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "added_tokens.json",
)  # fmt: skip


def tensor_names(shape: EncoderShape) -> dict[str, tuple[str, ...]]:
    """Our name of each tensor -> the names in transformers, whose tensors are concatenated along dimension 0."""
    whole: dict[str, tuple[str, ...]] = {}
    for ours, hf_names in family_of(shape).tensors.items():
        for n in range(shape.own_layers if "{n}" in ours else 1):
            if shape.preset == "modern" and n == 0 and "attention_norm" in ours:
                continue  # its first layer does not have one
            if "embedding.projection" in ours and shape.embedding_size is None:
                continue  # the widths are equal
            whole[ours.format(n=n)] = tuple(name.format(n=n) for name in hf_names)
    return whole


def to_hf_weights(weights: Mapping[str, Tensor], shape: EncoderShape) -> dict[str, Tensor]:
    """Our weights under the names in transformers."""
    tensors = {}
    for ours, hf_names in tensor_names(shape).items():
        for name, chunk in zip(hf_names, weights[ours].chunk(len(hf_names)), strict=True):
            tensors[name] = chunk.contiguous()
    return tensors


def from_hf_weights(weights: Mapping[str, Tensor], shape: EncoderShape) -> dict[str, Tensor]:
    """Weights of transformers under our names; missing tensors are left out, and only joined ones are copied."""
    chunks = {ours: [weights[n] for n in hf_names if n in weights] for ours, hf_names in tensor_names(shape).items()}
    return {ours: torch.cat(parts) if len(parts) > 1 else parts[0] for ours, parts in chunks.items() if parts}
