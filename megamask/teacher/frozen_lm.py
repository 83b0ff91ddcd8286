"""Any masked language model, read for the states that its last matrix turns into logits.

What it may be, and how it is told apart:

- a run of megamask (``checkpoints/``): its newest checkpoint; or one checkpoint inside of a run (``MANIFEST.json``).
  Of any objective encoder and head are read: of 3ML in one stack an ordinary model, although its first layers were
  trained without [MASK]; of MAE-LM one whose predictions mean nothing, which ``beside`` tells;
- first weights (``shape.json`` beside ``model.safetensors``, as tools/convert_from_hf.py makes them);
- a folder or hub name of transformers: BERT and ModernBERT go through our own encoder, any other class is asked as
  transformers computes it (`hf.masked_lm`).

Only safetensors are read, and no code that comes with a model is run. Costs the whole model in the host's memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask import hf
from megamask.batch import Layout
from megamask.checkpoint import format
from megamask.data.tokenizer import TOKENIZER
from megamask.errors import CheckpointError, ConfigError, listed, raise_all
from megamask.hf.config_json import has_preset
from megamask.hf.importing import fetch_model
from megamask.hf.masked_lm import load_hf_masked_lm, model_type
from megamask.hf.tensor_names import DECODER, EMBEDDING, bare, misfits
from megamask.hf.weights import read_hf_tensors
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import SHAPE, EncoderShape


@dataclass(frozen=True)
class MaskedLM:
    """``states``: (tokens (T,), layout, rows (Q,)) -> (Q, D); times ``weight``' plus ``bias``: the logits of the rows.

    ``longest`` is the longest sequence it can read, None if there is no limit; ``tokenizer`` is the folder of its own.
    """

    states: nn.Module
    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"]
    longest: int | None
    tokenizer: Path
    beside: tuple[str, ...] = ()
    """Parts of a run's objective that are left out. Where there are any, they filled in [MASK], and the encoder has
    never seen it."""

    def fingerprint(self) -> str:
        """sha256 of all its numbers, in their present precision: what was asked, however it came."""
        digest = hashlib.sha256()
        tensors = self.states.state_dict() | {"weight": self.weight, "bias": self.bias}
        for name in sorted(tensors):
            digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
            digest.update(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class HiddenStatesFn(nn.Module):
    """Our encoder and head, up to the decoder."""

    def __init__(self, encoder: Encoder, head: MaskedLMHead):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, tokens: Int64[Tensor, " T"], layout: Layout, rows: Int64[Tensor, " Q"]) -> Float[Tensor, "Q D"]:
        """The states at ``rows`` that the decoder turns into logits."""
        x = self.encoder.run(self.encoder.embed(tokens, layout), layout)
        return self.head.transform(x.index_select(0, rows))


def read_masked_lm(path: str | Path, setting: str) -> MaskedLM:
    """The model at ``path``, which the user gave as ``setting``; on the CPU, in 32 bits.

    Raises CheckpointError with a sentence for everything that is missing, damaged or not known, ConfigError for a
    model that is whole and cannot be used: its numbers are none, or it ends in more than a matrix.
    """
    folder = Path(path)
    if (folder / format.MANIFEST).exists() or (folder / "checkpoints").is_dir():
        found = format.find_checkpoint(folder)
        # a checkpoint lies in RUN/checkpoints/step-N
        run = found.parent.parent
        return _own(EncoderShape.load(run), format.read_weights(found), run / TOKENIZER, found)
    if (folder / SHAPE).exists():
        return _own(EncoderShape.load(folder), read_hf_tensors(folder), folder / TOKENIZER, folder)
    folder = fetch_model(path, setting)
    if model_type(folder) is None:
        raise CheckpointError(
            f"`{setting}` is {folder}, which is neither a run of megamask (checkpoints), nor first weights ({SHAPE}), "
            "nor a model of transformers (config.json)."
        )
    if has_preset(folder):
        model = hf.import_model(folder)
        return _own(model.shape, model.weights, folder, folder)
    _all_finite(read_hf_tensors(folder), folder)
    return MaskedLM(*load_hf_masked_lm(folder), tokenizer=folder)


def _own(shape: EncoderShape, weights: Mapping[str, Tensor], tokenizer: Path, where: Path) -> MaskedLM:
    kept = {name: tensor.float() for name, tensor in weights.items() if name.startswith(("encoder.", "head."))}
    kept.pop(DECODER, None)
    raise_all(CheckpointError, misfits(kept, shape, str(where)))
    _all_finite(kept, where)
    model = bare(shape)
    model.load_state_dict(kept | {DECODER: kept[EMBEDDING]}, assign=True)
    encoder, head = model["encoder"], model["head"]
    assert isinstance(encoder, Encoder) and isinstance(head, MaskedLMHead)
    table = encoder.embedding.tokens.weight
    assert isinstance(table, nn.Parameter)
    head.decoder.weight = table  # one parameter again, which moves and changes type once
    weight, bias = head.decoder.weight.detach(), head.decoder.bias.detach()
    beside = sorted({name.split(".")[0] for name in weights} - {"encoder", "head"})
    return MaskedLM(HiddenStatesFn(encoder, head), weight, bias, shape.max_positions, tokenizer, tuple(beside))


def _all_finite(weights: Mapping[str, Tensor], where: Path) -> None:
    wrong = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        raise ConfigError(
            f"{where} holds numbers in {listed(wrong, 'tensor')}, that are not finite (NaN or infinity). Use another "
            "checkpoint."
        )
