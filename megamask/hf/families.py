"""The families of models that megamask imports and exports: how transformers names their settings and tensors.

A family is data. All but ModernBERT compute what the preset `bert` computes, with other names, positions, token types
and widths. Not here, and why: DeBERTa and MPNet add relative positions to
attention, and XLM-RoBERTa-XL and RoBERTa-PreLayerNorm normalise before each block. Names are those of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megamask.model.shape import Activation, EncoderShape

EMBEDDING, DECODER = "encoder.embedding.tokens.weight", "head.decoder.weight"
Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class ModelFamily:
    """One class of transformers, as far as it differs from the others."""

    architecture: str
    """Class of the masked language model."""
    config: str
    """Class of the configuration."""
    body: str
    """Prefix of the encoder's tensors in a masked language model."""
    parts: tuple[str, ...]
    """What follows the prefix."""
    tensors: Names
    """Our name of each tensor -> the names in transformers, whose tensors are concatenated along dimension 0. {n} is
    the layer."""
    tied: Mapping[str, str]
    """The second name of a tensor, which transformers may or may not write -> the first. The output matrix is first."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Field of `EncoderShape` -> key of config.json; of the families that compute what `bert` does."""
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Fields of `EncoderShape` that the class fixes."""
    activation: str = "hidden_act"
    """Key of the activation function in config.json."""
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"gelu": "gelu"})
    """The value of that key -> `EncoderShape.activation`; the first with our value is written."""
    counts_from_pad: bool = False
    """Whether positions count from the id of the padding token + 1."""
    unused: tuple[str, ...] = ()
    """Beginnings of tensors that masked language modeling does not use."""


def family_of(shape: EncoderShape) -> ModelFamily:
    """The family whose names the weights of ``shape`` get."""
    return FAMILIES[model_type(shape)]


def model_type(shape: EncoderShape) -> str:
    """The `model_type` of ``shape`` in config.json."""
    return shape.family or {"bert": "bert", "modern": "modernbert"}[shape.preset]


def _modules(names: Names) -> dict[str, tuple[str, ...]]:
    """Weight and bias of each module."""
    return {
        f"{ours}.{part}": tuple(f"{name}.{part}" for name in hf_names)
        for ours, hf_names in names.items()
        for part in ("weight", "bias")
    }


def _bert_encoder(body: str) -> dict[str, tuple[str, ...]]:
    layer = f"{body}encoder.layer.{{n}}"
    return {
        EMBEDDING: (f"{body}embeddings.word_embeddings.weight",),
        "encoder.embedding.positions.weight": (f"{body}embeddings.position_embeddings.weight",),
        "encoder.embedding.token_types.weight": (f"{body}embeddings.token_type_embeddings.weight",),
        **_modules(
            {
                "encoder.embedding.norm": (f"{body}embeddings.LayerNorm",),
                "encoder.layers.{n}.qkv": tuple(f"{layer}.attention.self.{part}" for part in ("query", "key", "value")),
                "encoder.layers.{n}.attention_out": (f"{layer}.attention.output.dense",),
                "encoder.layers.{n}.attention_norm": (f"{layer}.attention.output.LayerNorm",),
                "encoder.layers.{n}.mlp_in": (f"{layer}.intermediate.dense",),
                "encoder.layers.{n}.mlp_out": (f"{layer}.output.dense",),
                "encoder.layers.{n}.mlp_norm": (f"{layer}.output.LayerNorm",),
            }
        ),
    }


def _head(dense: str, norm: str, bias: str) -> dict[str, tuple[str, ...]]:
    return {**_modules({"head.dense": (dense,), "head.norm": (norm,)}), "head.decoder.bias": (bias,)}


def _unused(body: str) -> tuple[str, ...]:
    return (f"{body}pooler.", f"{body}embeddings.position_ids", f"{body}embeddings.token_type_ids")


SIZES = {"vocab_size": "vocab_size", "max_positions": "max_position_embeddings"}
BERT_KEYS = SIZES | {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "norm_eps": "layer_norm_eps",
    "token_types": "type_vocab_size",
}
BERT_PARTS = ("embeddings.", "encoder.", "pooler.")
BERT = ModelFamily(
    "BertForMaskedLM", "BertConfig", "bert.", BERT_PARTS,
    tensors=_bert_encoder("bert.") | _head(
        "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"
    ),
    tied={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
          "cls.predictions.decoder.bias": "cls.predictions.bias"},
    keys=BERT_KEYS,
    unused=(*_unused("bert."), "cls.seq_relationship."),
)  # fmt: skip


def _roberta(name: str) -> ModelFamily:
    return ModelFamily(
        f"{name}ForMaskedLM", f"{name}Config", "roberta.", BERT_PARTS,
        tensors=_bert_encoder("roberta.") | _head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
        tied={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
              "lm_head.decoder.bias": "lm_head.bias"},
        keys=BERT_KEYS,
        counts_from_pad=True,
        unused=_unused("roberta."),
    )  # fmt: skip


_DISTIL_LAYER = "distilbert.transformer.layer.{n}"
DISTILBERT = ModelFamily(
    "DistilBertForMaskedLM", "DistilBertConfig", "distilbert.", ("embeddings.", "transformer."),
    tensors={
        EMBEDDING: ("distilbert.embeddings.word_embeddings.weight",),
        "encoder.embedding.positions.weight": ("distilbert.embeddings.position_embeddings.weight",),
        **_modules({
            "encoder.embedding.norm": ("distilbert.embeddings.LayerNorm",),
            "encoder.layers.{n}.qkv": tuple(f"{_DISTIL_LAYER}.attention.{part}_lin" for part in "qkv"),
            "encoder.layers.{n}.attention_out": (f"{_DISTIL_LAYER}.attention.out_lin",),
            "encoder.layers.{n}.attention_norm": (f"{_DISTIL_LAYER}.sa_layer_norm",),
            "encoder.layers.{n}.mlp_in": (f"{_DISTIL_LAYER}.ffn.lin1",),
            "encoder.layers.{n}.mlp_out": (f"{_DISTIL_LAYER}.ffn.lin2",),
            "encoder.layers.{n}.mlp_norm": (f"{_DISTIL_LAYER}.output_layer_norm",),
        }),
        **_head("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    },
    tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    keys=SIZES | {
        "num_layers": "n_layers", "hidden_size": "dim", "num_heads": "n_heads", "intermediate_size": "hidden_dim",
    },
    fixed={"norm_eps": 1e-12, "token_types": 0},
    activation="activation",
    unused=_unused("distilbert."),
)  # fmt: skip
ELECTRA = ModelFamily(
    "ElectraForMaskedLM", "ElectraConfig", "electra.", ("embeddings.", "embeddings_project.", "encoder."),
    tensors=_bert_encoder("electra.")
    | _modules({"encoder.embedding.projection": ("electra.embeddings_project",)})
    | _head("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"),
    tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    keys=BERT_KEYS | {"embedding_size": "embedding_size"},
    unused=_unused("electra."),
)  # fmt: skip
_ALBERT_LAYER = "albert.encoder.albert_layer_groups.{n}.albert_layers.0"
ALBERT = ModelFamily(
    "AlbertForMaskedLM", "AlbertConfig", "albert.", BERT_PARTS,
    tensors={
        EMBEDDING: ("albert.embeddings.word_embeddings.weight",),
        "encoder.embedding.positions.weight": ("albert.embeddings.position_embeddings.weight",),
        "encoder.embedding.token_types.weight": ("albert.embeddings.token_type_embeddings.weight",),
        **_modules({
            "encoder.embedding.norm": ("albert.embeddings.LayerNorm",),
            "encoder.embedding.projection": ("albert.encoder.embedding_hidden_mapping_in",),
            "encoder.layers.{n}.qkv": tuple(f"{_ALBERT_LAYER}.attention.{part}" for part in ("query", "key", "value")),
            "encoder.layers.{n}.attention_out": (f"{_ALBERT_LAYER}.attention.dense",),
            "encoder.layers.{n}.attention_norm": (f"{_ALBERT_LAYER}.attention.LayerNorm",),
            "encoder.layers.{n}.mlp_in": (f"{_ALBERT_LAYER}.ffn",),
            "encoder.layers.{n}.mlp_out": (f"{_ALBERT_LAYER}.ffn_output",),
            "encoder.layers.{n}.mlp_norm": (f"{_ALBERT_LAYER}.full_layer_layer_norm",),
        }),
        **_head("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
    },
    tied={"predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
          "predictions.decoder.bias": "predictions.bias"},
    keys=BERT_KEYS | {"embedding_size": "embedding_size", "layer_groups": "num_hidden_groups"},
    activations={"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    unused=(*_unused("albert."), "sop_classifier."),
)  # fmt: skip
MODERNBERT = ModelFamily(
    "ModernBertForMaskedLM", "ModernBertConfig", "model.", ("embeddings.", "layers.", "final_norm."),
    tensors={
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
    },
    tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
)  # fmt: skip
FAMILIES = {
    "bert": BERT,
    "modernbert": MODERNBERT,
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "albert": ALBERT,
}
"""By the `model_type` in config.json."""
