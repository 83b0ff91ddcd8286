"""Convert an EncoderShape to a config.json of transformers and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megamask.errors import CheckpointError, must, raise_all
from megamask.hf import lazy_transformers
from megamask.hf.model_folder import read_config_json
from megamask.model.shape import EncoderShape


def write_config(shape: EncoderShape, tokenizer: lazy_transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the config.json of ``shape``."""
    common: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "pad_token_id": shape.pad_id,
        "dtype": "float32",
    }
    config = _bert(shape, common) if shape.preset == "bert" else _modern(shape, common, tokenizer)
    config.save_pretrained(folder)
    if shape.preset == "modern":
        _add_old_keys(shape, folder / "config.json")


def _bert(shape: EncoderShape, common: dict[str, Any]) -> lazy_transformers.BertConfig:
    # dropout keeps BERT's 0.1: it is used in fine-tuning and says nothing about the pretraining
    return lazy_transformers.BertConfig(
        **common,
        architectures=["BertForMaskedLM"],
        layer_norm_eps=shape.norm_eps,
        type_vocab_size=shape.token_types,
    )


def _modern(
    shape: EncoderShape, common: dict[str, Any], tokenizer: lazy_transformers.PreTrainedTokenizerBase
) -> lazy_transformers.ModernBertConfig:
    windows = [shape.window(layer) for layer in range(shape.num_layers)]
    return lazy_transformers.ModernBertConfig(
        **common,
        architectures=["ModernBertForMaskedLM"],
        norm_eps=shape.norm_eps,
        local_attention=shape.local_window,
        layer_types=["full_attention" if window is None else "sliding_attention" for window in windows],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": shape.local_rope_theta},
        },
        cls_token_id=tokenizer.cls_token_id,
        bos_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )


def _add_old_keys(shape: EncoderShape, path: Path) -> None:
    """transformers 4 reads other keys; without them it would silently use its defaults, which are another model."""
    settings = json.loads(path.read_text())
    settings |= {
        "global_attn_every_n_layers": shape.global_every,
        "global_rope_theta": shape.rope_theta,
        "local_rope_theta": shape.local_rope_theta,
    }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def has_preset(folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` is a BERT or ModernBERT that our encoder can compute."""
    try:
        read_shape(folder)
    except CheckpointError:
        return False
    return True


def read_shape(folder: Path, *, any_head: bool = False) -> EncoderShape:
    """The shape of the checkpoint in ``folder``; CheckpointError with everything that no preset has.

    With ``any_head``, an output matrix that is not the token table is accepted.
    """
    path, config = folder / "config.json", read_config_json(folder)
    model_type = config.get("model_type")
    if model_type not in ("bert", "modernbert"):
        raise CheckpointError(must("model_type", "be 'bert' or 'modernbert'", model_type, f"See {path}."))
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path} has a `quantization_config`, so the weights are quantized. Load the model in transformers, "
            "dequantize it and save it with `save_pretrained`."
        )
    if any_head:
        config = config | {"tie_word_embeddings": True}
    try:
        if model_type == "bert":
            shape = _bert_shape(lazy_transformers.BertConfig.from_dict(config), config)
        else:
            shape = _modern_shape(lazy_transformers.ModernBertConfig.from_dict(config))
        problems = shape.problems()
    except CheckpointError as error:
        raise CheckpointError(*(f"{problem} See {path}." for problem in error.problems)) from None
    except Exception as error:  # a malformed value can make the library raise anything
        raise CheckpointError(f"{path} is not a configuration of {model_type}: {error}.") from None
    if problems:
        raise CheckpointError(f"{path} does not describe a possible model: {' '.join(problems)}")
    return shape


def is_tied(folder: Path) -> bool:
    """Whether the config.json in ``folder`` says that the output matrix is the token table."""
    return bool(read_config_json(folder).get("tie_word_embeddings", True))


def _unsupported(config: lazy_transformers.PreTrainedConfig, supported: dict[str, object]) -> list[str]:
    return [
        must(f"config.json: {key}", f"be {value!r}", actual)
        for key, value in supported.items()
        if (actual := getattr(config, key, value)) != value
    ]


def _common(config: lazy_transformers.BertConfig | lazy_transformers.ModernBertConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "pad_id": config.pad_token_id or 0,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_positions": config.max_position_embeddings,
    }


def _bert_shape(config: lazy_transformers.BertConfig, settings: dict) -> EncoderShape:
    supported = {"hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}
    problems = _unsupported(config, supported)
    positions = settings.get("position_embedding_type", "absolute")
    if positions != "absolute":
        problems.append(must("config.json: position_embedding_type", "be 'absolute'", positions))
    raise_all(CheckpointError, problems)
    return EncoderShape("bert", **_common(config), norm_eps=config.layer_norm_eps, token_types=config.type_vocab_size)


def _modern_shape(config: lazy_transformers.ModernBertConfig) -> EncoderShape:
    problems = _unsupported(
        config,
        {"hidden_activation": "gelu", "classifier_activation": "gelu", "norm_bias": False, "attention_bias": False,
         "mlp_bias": False, "classifier_bias": False, "decoder_bias": True, "tie_word_embeddings": True},
    )  # fmt: skip
    assert config.layer_types is not None and config.rope_parameters is not None
    is_global = [kind == "full_attention" for kind in config.layer_types]
    every = next((n for n in range(1, len(is_global)) if is_global[n]), len(is_global))
    if is_global != [n % every == 0 for n in range(len(is_global))]:
        problems.append(
            must(
                "config.json: layer_types", "have full attention in every n-th layer from the first", config.layer_types
            )
        )
    if config.local_attention % 2:
        problems.append(must("config.json: local_attention", "be even", config.local_attention))
    thetas = {}
    for kind, rope in config.rope_parameters.items():
        thetas[kind] = float(rope["rope_theta"])
        if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(must(f"config.json: rope_parameters.{kind}", "be of the default type", rope))
    raise_all(CheckpointError, problems)
    return EncoderShape(
        "modern",
        **_common(config),
        norm_eps=config.norm_eps,
        global_every=every,
        local_window=config.local_attention,
        rope_theta=thetas["full_attention"],
        local_rope_theta=thetas["sliding_attention"],
    )
