"""Encoder and head of megamask made from tensors by name, which are checked first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megamask.errors import SHOWN, CheckpointError, listed, must, raise_all
from megamask.hf.families import DECODER, EMBEDDING
from megamask.hf.weights import check_finite
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import EncoderShape


def encoder_and_head(weights: Mapping[str, Tensor], shape: EncoderShape, where: str) -> tuple[Encoder, MaskedLMHead]:
    """Encoder and head with ``weights`` in fp32, in evaluation mode; tensors of other modules are ignored.

    fp32 tensors are not copied. Raises CheckpointError, saying ``where`` the tensors are, if some are missing, unknown,
    of another shape, or have NaN or Inf.
    """
    tensors = {name: tensor for name, tensor in weights.items() if name.startswith(("encoder.", "head."))}
    tensors.pop(DECODER, None)
    raise_all(CheckpointError, mismatches(tensors, shape, where))
    check_finite(tensors, where)
    model = empty_model(shape)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict(tensors | {DECODER: tensors[EMBEDDING]}, assign=True)
    encoder, head = model.eval()["encoder"], model["head"]
    assert isinstance(encoder, Encoder) and isinstance(head, MaskedLMHead)
    table = encoder.embedding.tokens.weight
    assert isinstance(table, nn.Parameter)
    head.decoder.weight = table  # one parameter again, which moves and changes its type once
    return encoder, head


def empty_model(shape: EncoderShape) -> nn.ModuleDict:
    """Encoder and head with the names of a checkpoint, on the meta device, without memory for weights."""
    with torch.device("meta"):
        encoder = Encoder(shape)
        return nn.ModuleDict({"encoder": encoder, "head": MaskedLMHead(encoder)})


def mismatches(weights: Mapping[str, Tensor], shape: EncoderShape, where: str, *, headless: bool = False) -> list[str]:
    """Sentences for tensors that are missing, unknown or of another shape; ``headless`` weights have no head."""
    shapes = {
        name: tuple(p.shape)
        for name, p in empty_model(shape).named_parameters()
        if not (headless and name.startswith("head."))
    }
    missing = [name for name in shapes if name not in weights]
    unknown = [name for name in weights if name not in shapes]
    wrong = [name for name, tensor in weights.items() if name in shapes and tuple(tensor.shape) != shapes[name]]
    problems = []
    if not headless and not any(name.startswith("head.") for name in weights):
        problems.append(
            f"{where} has no masked-language head, so it predicts no tokens. Train one first: use it as `init` of a "
            "run."
        )
        missing = [name for name in missing if not name.startswith("head.")]
    if missing:
        problems.append(f"{where} lacks {listed(missing, 'tensor')}.")
    if unknown:
        problems.append(f"{where} has {listed(unknown, 'tensor')}, which this encoder does not have.")
    problems += [
        must(name, f"have the shape {shapes[name]}", tuple(weights[name].shape), f"It is in {where}.")
        for name in wrong[:SHOWN]
    ]
    if len(wrong) > SHOWN:
        problems.append(f"{where} has {len(wrong) - SHOWN} more tensors of another shape.")
    return problems
