"""The tied head: megamask makes logits with the token table, so a checkpoint's output matrix must be that table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megamask.hf.families import family_of
from megamask.model.shape import EncoderShape

CURE = (
    "megamask makes logits with the token table itself. `megamask import --new-head` imports the encoder and "
    "leaves this head out."
)


def merge_tied(tensors: dict[str, Tensor], shape: EncoderShape) -> None:
    """Keep each tied tensor in ``tensors`` once, under the first of its two names."""
    for copy, original in family_of(shape).tied.items():
        if copy in tensors:
            tensors.setdefault(original, tensors.pop(copy))


def untied_problems(tensors: Mapping[str, Tensor], shape: EncoderShape, where: Path, tied: bool) -> list[str]:
    """Sentences for an output matrix or bias that differs from the tensor that megamask uses in its place.

    ``tied`` is what the configuration says.
    """
    pairs = family_of(shape).tied
    different = [
        f"{copy} and {original}"
        for copy, original in pairs.items()
        if copy in tensors and original in tensors and not _equal(tensors[copy], tensors[original])
    ]
    matrix = next(iter(pairs))
    if different:
        return [f"{where} must have the same tensor as {' and as '.join(different)}, but they differ. {CURE}"]
    if not tied and matrix not in tensors:
        return [
            f"{where / 'config.json'} says that the output matrix is not the token table (tie_word_embeddings is "
            f"false), but {where} lacks {matrix}. {CURE}"
        ]
    return []


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
