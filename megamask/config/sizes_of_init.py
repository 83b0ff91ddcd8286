"""What contradicts the weights that `init` names, which decide the preset and the sizes of the encoder."""

from __future__ import annotations

from dataclasses import replace

from megamask.config.phases import longest_sequence
from megamask.config.pretrain_config import PretrainConfig
from megamask.errors import CheckpointError, Removable, must
from megamask.model.shape import SIZES, EncoderShape

OPTIONAL = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "intermediate_size",
    "max_positions",
    "layer_groups",
    "embedding_size",
)
"""Sizes that may be left out, so that those of a recipe can be."""


def init_problems(config: PretrainConfig) -> list[str]:
    """A sentence for each optional size and for sequences that contradict `init`; none if its shape cannot be read,
    which fails later."""
    if (shape := _shape_of_init(config)) is None:
        return []
    problems: list[str] = [
        Removable(f"model.{name}", _contradiction("none" if own is None else own, value), None)
        for name in OPTIONAL
        if (value := getattr(config.model, name)) not in (None, own := getattr(shape, name))
    ]
    if (length := longest_sequence(config)) > shape.max_positions:
        rule = f"be at most {shape.max_positions}, the positions of the weights of `init`"
        problems.append(must("packs.length", rule, length))
    return problems


def decided_by_init(config: PretrainConfig) -> dict[str, str]:
    """The other settings of `model` that contradict `init`, each with a sentence for a user who typed it.

    They always have a value, so those of a recipe stay in the configuration, without effect.
    """
    if (shape := _shape_of_init(config)) is None:
        return {}
    model, (layers, width) = config.model, SIZES[config.model.size]
    pairs: dict[str, tuple[object, object]] = {
        "preset": ("roberta" if shape.position_offset else shape.preset, model.preset),
        "size": (
            f"{shape.num_layers}x{shape.hidden_size}",
            f"{model.num_layers or layers}x{model.hidden_size or width}",
        ),
        "global_every": (shape.global_every, model.global_every),
    }
    if shape.global_every > 1:
        pairs["local_window"] = (shape.local_window, model.local_window)
    return {
        f"model.{name}": f"`model.{name}` {_contradiction(own, value)}. Remove it."
        for name, (own, value) in pairs.items()
        if own != value
    }


def _shape_of_init(config: PretrainConfig) -> EncoderShape | None:
    if config.init is None:
        return None
    try:
        shape = EncoderShape.load(config.init)
    except CheckpointError:
        return None
    return shape if config.init_layers is None else replace(shape, num_layers=len(config.init_layers))


def _contradiction(own: object, value: object) -> str:
    return f"contradicts the weights of `init`, which have {own}, not {value}"
