"""Convert an EncoderShape to a config.json of transformers and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megamask.errors import CheckpointError, must, raise_all
from megamask.hf import lazy_transformers
from megamask.hf.families import FAMILIES, SIZES, family_of
from megamask.hf.model_folder import read_config_json
from megamask.model.shape import EncoderShape

MODERN_SIZES = SIZES | {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
"""Field of `EncoderShape` -> key of a ModernBERT's config.json."""


def write_config(shape: EncoderShape, tokenizer: lazy_transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the config.json of ``shape``."""
    common: dict[str, Any] = {
        "architectures": [family_of(shape).architecture],
        "pad_token_id": shape.pad_id,
        "dtype": "float32",
    }
    config = _bert(shape, common, tokenizer) if shape.preset == "bert" else _modern(shape, common, tokenizer)
    config.save_pretrained(folder)
    if shape.preset == "modern":
        _add_old_keys(shape, folder / "config.json")


def _bert(
    shape: EncoderShape, common: dict[str, Any], tokenizer: lazy_transformers.PreTrainedTokenizerBase
) -> lazy_transformers.PreTrainedConfig:
    # dropout keeps BERT's 0.1: it is used in fine-tuning and says nothing about the pretraining
    family = family_of(shape)
    values = vars(shape) | {
        "max_positions": shape.max_positions + shape.position_offset,
        "embedding_size": shape.table_width,
    }
    if family.counts_from_pad:
        common |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    sizes = {key: values[name] for name, key in family.keys.items()}
    sizes[family.activation] = next(name for name, ours in family.activations.items() if ours == shape.activation)
    return getattr(lazy_transformers, family.config)(**common, **sizes)


def _modern(
    shape: EncoderShape, common: dict[str, Any], tokenizer: lazy_transformers.PreTrainedTokenizerBase
) -> lazy_transformers.ModernBertConfig:
    windows = [shape.window(layer) for layer in range(shape.num_layers)]
    return lazy_transformers.ModernBertConfig(
        **common,
        **{key: getattr(shape, name) for name, key in MODERN_SIZES.items()},
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
        return read_shape(folder).family is None
    except CheckpointError:
        return False


def read_shape(folder: Path, *, any_head: bool = False) -> EncoderShape:
    """The shape of the checkpoint in ``folder``; CheckpointError with everything that no preset has.

    With ``any_head``, an output matrix that is not the token table is accepted.
    """
    path, config = folder / "config.json", read_config_json(folder)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(must("model_type", f"be one of {', '.join(FAMILIES)}", model_type, f"See {path}."))
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path} has a `quantization_config`, so the weights are quantized. Load the model in transformers, "
            "dequantize it and save it with `save_pretrained`."
        )
    if any_head:
        config = config | {"tie_word_embeddings": True}
    try:
        if model_type == "modernbert":
            shape = _modern_shape(lazy_transformers.ModernBertConfig.from_dict(config))
        else:
            shape = _bert_shape(model_type, config)
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


def _bert_shape(model_type: str, settings: dict[str, Any]) -> EncoderShape:
    family = FAMILIES[model_type]
    config = getattr(lazy_transformers, family.config).from_dict(settings)
    supported: dict[str, object] = {"is_decoder": False, "add_cross_attention": False}
    supported |= {"tie_word_embeddings": True, "inner_group_num": 1}
    problems = _unsupported(config, supported)
    activation = getattr(config, family.activation)
    if activation not in family.activations:
        rule = f"be {' or '.join(repr(name) for name in family.activations)}"
        problems.append(must(f"config.json: {family.activation}", rule, activation))
    positions = settings.get("position_embedding_type", "absolute")
    if positions != "absolute":
        problems.append(must("config.json: position_embedding_type", "be 'absolute'", positions))
    if family.counts_from_pad and config.pad_token_id is None:
        problems.append(must("config.json: pad_token_id", "be a number, from which positions count", None))
    raise_all(CheckpointError, problems)
    pad = config.pad_token_id or 0
    offset = pad + 1 if family.counts_from_pad else 0
    values: dict[str, Any] = {**family.fixed, **{name: getattr(config, key) for name, key in family.keys.items()}}
    values |= {"max_positions": values["max_positions"] - offset, "position_offset": offset}
    if model_type == "electra" and values["embedding_size"] == values["hidden_size"]:
        values["embedding_size"] = None
    other: Any = None if model_type == "bert" else model_type
    return EncoderShape("bert", pad_id=pad, family=other, activation=family.activations[activation], **values)


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
        pad_id=config.pad_token_id or 0,
        **{name: getattr(config, key) for name, key in MODERN_SIZES.items()},
        norm_eps=config.norm_eps,
        global_every=every,
        local_window=config.local_attention,
        rope_theta=thetas["full_attention"],
        local_rope_theta=thetas["sliding_attention"],
    )
