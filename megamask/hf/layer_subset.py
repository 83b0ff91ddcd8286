"""A shallower model out of some layers of a deeper one, as DistilBERT began (Sanh et al. 2019: every other layer)."""

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
    """The shape and weights of an encoder that has the ``layers`` of ``weights``, in this order, and all else.

    Layers count from 0. Where local and global layers take turns, each must land in a place of its own kind. A norm
    that a layer lacks in its new place is left out: ModernBERT's first layer has none before attention, so another
    layer that comes first loses its own, and layer 0 cannot come later. Raises ConfigError, by the ``name`` of the
    setting.
    """
    raise_all(ConfigError, _problems(shape, layers, name))
    found = {key: tensor for key, tensor in weights.items() if not LAYER.fullmatch(key)}
    parts = {(int(m[1]), m[2]): tensor for key, tensor in weights.items() if (m := LAYER.fullmatch(key))}
    for place, layer in enumerate(layers):
        for (number, part), tensor in parts.items():
            unused = shape.preset == "modern" and place == 0 and part.startswith("attention_norm.")
            if number == layer and not unused:
                found[f"encoder.layers.{place}.{part}"] = tensor
    return replace(shape, num_layers=len(layers)), found


def _problems(shape: EncoderShape, layers: tuple[int, ...], name: str) -> list[str]:
    if not layers:
        return [f"`{name}` must name at least one layer, but is empty."]
    last = shape.num_layers - 1
    if any(not 0 <= layer <= last for layer in layers):
        return [must(name, f"name layers from 0 to {last}", layers)]
    if any(a >= b for a, b in pairwise(layers)):
        return [must(name, "be in ascending order, each layer once", layers)]
    strange = [layer for place, layer in enumerate(layers) if shape.window(layer) != shape.window(place)]
    if strange:
        return [
            f"`{name}` puts layer {strange[0]} where one that looks {_far(shape, layers.index(strange[0]))} stands, "
            f"but it looks {_far(shape, strange[0])}: of every {shape.global_every} layers, the first looks at the "
            "whole sequence. Choose others."
        ]
    return []


def _far(shape: EncoderShape, layer: int) -> str:
    return "at the whole sequence" if shape.window(layer) is None else "near by"
