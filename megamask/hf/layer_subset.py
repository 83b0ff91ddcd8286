"""A shallower model from some layers of a deeper one, as DistilBERT starts (Sanh et al. 2019: every other layer)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from megamask.errors import ConfigError, must, raise_all
from megamask.model.shape import EncoderShape

LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")


def pick_layers(
    weights: Mapping[str, Tensor], shape: EncoderShape, layers: tuple[int, ...], name: str = "init_layers"
) -> tuple[EncoderShape, dict[str, Tensor]]:
    """The shape and weights of an encoder with only the ``layers`` of ``weights``, in this order.

    Layers count from 0. If local and global layers alternate, each layer must keep its kind of attention. A norm that
    a layer does not have at its new position is left out: ModernBERT's first layer has no norm before attention, so
    another layer that comes first loses its own, and layer 0 cannot come later. Raises ConfigError with the ``name``
    of the setting.
    """
    raise_all(ConfigError, _problems(shape, layers, name))
    matches = {key: LAYER.fullmatch(key) for key in weights}
    selected = {key: weights[key] for key, match in matches.items() if not match}
    for position, layer in enumerate(layers):
        for key, match in matches.items():
            if not match or int(match[1]) != layer:
                continue
            if shape.preset == "modern" and position == 0 and match[2].startswith("attention_norm."):
                continue
            selected[f"encoder.layers.{position}.{match[2]}"] = weights[key]
    return replace(shape, num_layers=len(layers)), selected


def _problems(shape: EncoderShape, layers: tuple[int, ...], name: str) -> list[str]:
    if not layers:
        return [f"`{name}` must name at least one layer, but is empty."]
    if shape.layer_groups:
        return [f"`{name}` cannot choose layers of a model whose layers share weights. Remove it."]
    last = shape.num_layers - 1
    if any(not 0 <= layer <= last for layer in layers):
        return [must(name, f"name layers from 0 to {last}", layers)]
    if any(a >= b for a, b in pairwise(layers)):
        return [must(name, "be in ascending order, each layer once", layers)]
    for position, layer in enumerate(layers):
        if shape.window(layer) != shape.window(position):
            return [
                f"`{name}` puts layer {layer}, which has {_attention(shape, layer)} attention, at position {position}, "
                f"which has {_attention(shape, position)} attention: every {shape.global_every} layers, the first has "
                "global attention. Choose other layers."
            ]
    return []


def _attention(shape: EncoderShape, layer: int) -> str:
    return "global" if shape.window(layer) is None else "local"
