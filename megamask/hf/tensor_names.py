"""Our name of each tensor and theirs, and the way between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megamask.errors import SHOWN, listed, must
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import EncoderShape

WEIGHTS = "model.safetensors"
EMBEDDING, DECODER = "encoder.embedding.tokens.weight", "head.decoder.weight"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "added_tokens.json",
)  # fmt: skip


def tensor_names(shape: EncoderShape) -> dict[str, tuple[str, ...]]:
    """Our name of each tensor to theirs; several of theirs are glued along dimension 0 to make ours."""
    table = _bert_names() if shape.preset == "bert" else _modern_names()
    layers = {ours: theirs for ours, theirs in table.items() if "{n}" in ours}
    whole = {ours: theirs for ours, theirs in table.items() if "{n}" not in ours}
    for n in range(shape.num_layers):
        for ours, theirs in layers.items():
            if shape.preset == "modern" and n == 0 and "attention_norm" in ours:
                continue  # their first layer has none
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
"""What stands before the names of the encoder's tensors in a masked language model."""
PARTS = {
    "bert": ("embeddings.", "encoder.", "pooler."),
    "modern": ("embeddings.", "layers.", "final_norm."),
}
"""How their names go on."""
# the same tensor under a second name, which transformers may or may not write
TIED = {
    "bert": {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
             "cls.predictions.decoder.bias": "cls.predictions.bias"},
    "modern": {"decoder.weight": "model.embeddings.tok_embeddings.weight"},
}  # fmt: skip
UNTIED = (
    "megamask makes logits with the token table itself. `tools/convert_from_hf.py --new-head` takes the encoder and "
    "starts a new head on it."
)
# parts of a BERT checkpoint that masked language modelling has no use for
LEFT_OUT = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids", "bert.embeddings.token_type_ids")


def to_theirs(weights: Mapping[str, Tensor], shape: EncoderShape) -> dict[str, Tensor]:
    """Our weights under their names."""
    table = tensor_names(shape)
    found = {}
    for ours, theirs in table.items():
        for name, part in zip(theirs, weights[ours].chunk(len(theirs)), strict=True):
            found[name] = part.contiguous()
    return found


def to_ours(weights: Mapping[str, Tensor], shape: EncoderShape) -> dict[str, Tensor]:
    """Their weights under our names; those that are not there are left out."""
    table = {ours: [weights[n] for n in theirs if n in weights] for ours, theirs in tensor_names(shape).items()}
    return {ours: torch.cat(parts) for ours, parts in table.items() if parts}


def bare(shape: EncoderShape) -> nn.ModuleDict:
    """Encoder and head with the names that a checkpoint has, without memory for weights."""
    with torch.device("meta"):
        encoder = Encoder(shape)
        return nn.ModuleDict({"encoder": encoder, "head": MaskedLMHead(encoder)})


def misfits(weights: Mapping[str, Tensor], shape: EncoderShape, where: str, *, headless: bool = False) -> list[str]:
    """Sentences for tensors that are missing, not known or of another shape; ``headless`` weights have no head."""
    wanted = {
        name: tuple(p.shape)
        for name, p in bare(shape).named_parameters()
        if not (headless and name.startswith("head."))
    }
    lacking = [name for name in wanted if name not in weights]
    strange = [name for name in weights if name not in wanted]
    wrong = [name for name, tensor in weights.items() if name in wanted and tuple(tensor.shape) != wanted[name]]
    problems = []
    if not headless and not any(name.startswith("head.") for name in weights):
        problems.append(
            f"{where} has no masked-language head, so it predicts no token. Train one on it first: name it as `init` "
            "of a run."
        )
        lacking = [name for name in lacking if not name.startswith("head.")]
    if lacking:
        problems.append(f"{where} lacks {listed(lacking, 'tensor')}.")
    if strange:
        problems.append(f"{where} has {listed(strange, 'tensor')}, which this encoder does not have.")
    problems += [
        must(name, f"have the shape {wanted[name]}", tuple(weights[name].shape), f"It lies in {where}.")
        for name in wrong[:SHOWN]
    ]
    if len(wrong) > SHOWN:
        problems.append(f"{where} has {len(wrong) - SHOWN} more tensors of another shape.")
    return problems
