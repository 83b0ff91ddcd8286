"""Sizes of `model` that contradict the weights that `init` names, which decide them."""

from __future__ import annotations

from dataclasses import replace

from megamask.config.pretrain_config import PretrainConfig
from megamask.errors import CheckpointError, Removable
from megamask.model.shape import EncoderShape, ModelConfig

SIZES = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "intermediate_size",
    "max_positions",
    "layer_groups",
    "embedding_size",
)


def init_problems(config: PretrainConfig) -> list[Removable]:
    """A sentence for each size that contradicts `init`; none if its shape cannot be read, which fails later."""
    if config.init is None:
        return []
    try:
        shape = EncoderShape.load(config.init)
    except CheckpointError:
        return []
    if config.init_layers is not None:
        shape = replace(shape, num_layers=len(config.init_layers))
    return contradicting_sizes(config.model, shape)


def contradicting_sizes(model: ModelConfig, shape: EncoderShape) -> list[Removable]:
    """A sentence for each size of ``model`` that is not the one of ``shape``, which `init` has."""
    return [
        Removable(f"model.{key}", f"contradicts the weights of `init`, which have {_named(own)}, not {value}", None)
        for key in SIZES
        if (value := getattr(model, key)) not in (None, own := getattr(shape, key))
    ]


def _named(value: int | None) -> str:
    return "none" if value is None else str(value)
