"""Which tensors of a checkpoint are the encoder and its masked-language head, told by their names.

A model may be saved under another prefix (``module.``, ``backbone.``), without a masked-language head, with heads for
other tasks, or with a shared tensor under either of its names (`tied_head`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megamask.errors import CheckpointError, listed, raise_all
from megamask.hf.families import family_of
from megamask.hf.tensor_names import tensor_names
from megamask.hf.tied_head import merge_tied, untied_problems
from megamask.hf.weights import FLOATS
from megamask.model.shape import EncoderShape


@dataclass(frozen=True)
class SelectedTensors:
    """The tensors of a model under the names that transformers gives them; without a head if there is none."""

    tensors: dict[str, Tensor]
    has_head: bool
    notes: tuple[str, ...]
    """A sentence for a prefix that was removed, and one for tensors that were left out."""


def select_tensors(
    tensors: Mapping[str, Tensor], shape: EncoderShape, where: Path, *, tied: bool = True, new_head: bool = False
) -> SelectedTensors:
    """The encoder and, unless ``new_head`` is set, the masked-language head among ``tensors``.

    ``tied``: whether the configuration says that the output matrix is the token table. Raises CheckpointError, naming
    ``where``, for tensors that are missing, unknown or quantized, and for an output matrix that is not tied.
    """
    body = family_of(shape).body
    wanted = {name for names in tensor_names(shape).values() for name in names}
    head = {name for name in wanted if not name.startswith(body)}
    renamed = {_current_norm_name(name): tensor for name, tensor in tensors.items()}
    prefix = _encoder_prefix(renamed, {name.removeprefix(body) for name in wanted - head}, where)
    selected, others = _split(renamed, shape, prefix, head)
    problems = [] if new_head or head.isdisjoint(selected) else untied_problems(selected, shape, where, tied)
    merge_tied(selected, shape)
    has_head = not head.isdisjoint(selected)
    if new_head or (shape.preset == "modern" and any(name.endswith("classifier.weight") for name in others)):
        # ModernBERT's classifiers also have a layer called `head.dense`
        others += [] if new_head else sorted(head & selected.keys())
        selected, has_head = {name: tensor for name, tensor in selected.items() if name not in head}, False
    expected = wanted if has_head else wanted - head
    if missing := sorted(expected - selected.keys()):
        problems.append(f"{where} lacks {listed(missing, 'tensor')}.")
    problems += _quantized(selected, where)
    if unknown := sorted(selected.keys() - expected):
        problems.append(f"{where} has {listed(unknown, 'tensor')}, which this encoder does not have.")
    raise_all(CheckpointError, problems)
    notes = []
    if prefix not in ("", body):
        notes.append(f"The encoder in {where} was read under the prefix {prefix!r}.")
    if others:
        notes.append(f"Left out, as neither encoder nor masked-language head: {listed(others, 'tensor')}.")
    return SelectedTensors(selected, has_head, tuple(notes))


def _quantized(tensors: Mapping[str, Tensor], where: Path) -> list[str]:
    """A sentence if some of the weights are integers or 8-bit numbers."""
    quantized = sorted(name for name, tensor in tensors.items() if tensor.dtype not in FLOATS)
    if not quantized:
        return []
    dtypes = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in quantized}))
    return [
        f"{where} has {listed(quantized, 'tensor')} of the type {dtypes}, so its weights are quantized. Load the model "
        "in transformers, dequantize it and save it with `save_pretrained`."
    ]


def _current_norm_name(name: str) -> str:
    """BERT's first checkpoints call the two vectors of a norm gamma and beta."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))


def _encoder_prefix(names: Collection[str], body: Collection[str], where: Path) -> str:
    """What precedes the names of the encoder's tensors; CheckpointError unless there is exactly one encoder."""
    counts = _prefixes(names, body)
    most = max(counts.values(), default=0)
    likely = [prefix for prefix, count in counts.items() if 2 * count > most]
    if 2 * most < len(body):
        few = ", ".join(sorted(names)[:3])
        raise CheckpointError(
            f"{where} has no encoder of the type that its config.json names: at most {most} of the encoder's "
            f"{len(body)} tensors share a prefix. The folder has {len(names)} tensors, such as {few}."
        )
    if len(likely) > 1:
        raise CheckpointError(
            f"{where} has {len(likely)} encoders, under the prefixes {listed(map(repr, likely))}. Save only one."
        )
    return likely[0]


def _prefixes(names: Iterable[str], known: Iterable[str]) -> Counter[str]:
    """How many of the ``known`` names follow each prefix; a prefix is empty or ends with a dot."""
    counts: Counter[str] = Counter()
    known = set(known)
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in known:
                counts["".join(f"{part}." for part in parts[:cut])] += 1
    return counts


def _split(
    tensors: Mapping[str, Tensor], shape: EncoderShape, prefix: str, head: Collection[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of encoder and head by their names in transformers, and the names of all others."""
    family = family_of(shape)
    body, heads = family.body, {*head, *family.tied}
    encoder = tuple(prefix + part for part in family.parts)
    head_prefix = max(_prefixes(tensors, heads).items(), key=lambda pair: pair[1], default=("", 0))[0]
    selected, others = {}, []
    for name, tensor in tensors.items():
        in_encoder = name.startswith(encoder)
        renamed = body + name.removeprefix(prefix) if in_encoder else name.removeprefix(head_prefix)
        if renamed.startswith(family.unused):
            continue
        if in_encoder or renamed in heads:
            selected[renamed] = tensor
        else:
            others.append(name)
    return selected, sorted(others)
