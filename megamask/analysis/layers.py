"""Any encoder, asked for its states after every layer: a run of ours, or a model of transformers.

Layer 0 is the embedding as it enters the first layer; the last is what the encoder hands on, its final norm included.
In between ``modern`` has the residual stream, which no norm has touched, and ``bert`` has the output of a norm. The
encoder of a run goes through our own code; any ``model``, an export too, through transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.batch import Layout
from megamask.checkpoint import format
from megamask.data import tokenizer as tokenizers
from megamask.errors import CheckpointError
from megamask.hf.hidden_states import load_hidden
from megamask.hf.tensor_names import WEIGHTS
from megamask.model.encoder import Encoder
from megamask.model.shape import SHAPE
from megamask.teacher import frozen_lm


@runtime_checkable
class LayerStates(Protocol):
    """(tokens, layout) -> the states of every row, a matrix for each layer from the embedding."""

    def __call__(self, tokens: Int64[Tensor, " T"], layout: Layout) -> Sequence[Float[Tensor, "T D"]]: ...


class OwnStates(nn.Module):
    """Our encoder, layer by layer."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Int64[Tensor, " T"], layout: Layout) -> list[Float[Tensor, "T D"]]:
        """The states of every row, layer by layer from the embedding."""
        found = [self.encoder.embed(tokens, layout)]
        for number in range(len(self.encoder.layers)):
            found.append(self.encoder.run(found[-1], layout, slice(number, number + 1)))
        return found


@dataclass(frozen=True)
class Layered:
    """An encoder and what must be known to feed it.

    ``states`` is a module with the signature of ``HiddenStatesFn``. ``longest`` is the longest sequence it can read,
    None if there is no limit; ``tokenizer`` is the folder of its own; ``vocabulary`` is how many rows its table has.
    """

    name: str
    states: nn.Module
    layers: int
    width: int
    longest: int | None
    tokenizer: Path
    vocabulary: int
    source: str
    without_masks: bool = False
    """Whether it was pretrained on sequences from which the rows of [MASK] were left out (MAE-LM)."""

    def fingerprint(self) -> str:
        """sha256 of all its numbers, by name."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.states.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def open_run_encoder(path: Path, step: int | None = None) -> Layered:
    """The encoder in a run folder (its checkpoint at ``step``, else the newest), a checkpoint, or first weights.

    Raises CheckpointError for what is missing, damaged or of another shape.
    """
    if not path.is_dir():
        raise CheckpointError(f"`run` must be a run folder or a checkpoint in one, but there is no folder {path}.")
    first = (path / SHAPE).exists() and (path / WEIGHTS).exists()
    found = path if first and step is None else format.find_checkpoint(path, step)
    model = frozen_lm.read_masked_lm(found, "run")
    encoder = getattr(model.states, "encoder", None)
    assert isinstance(encoder, Encoder)
    shape = encoder.shape
    run = path if found == path and first else found.absolute().parent.parent
    name = run.name if first else f"{run.name}, {found.name.replace('-', ' ')}"
    return Layered(
        name, OwnStates(encoder).eval(), shape.num_layers, shape.hidden_size, shape.max_positions, model.tokenizer,
        shape.vocab_size, str(found), "decoder" in model.beside,
    )  # fmt: skip


def open_hf_encoder(source: str) -> Layered:
    """The encoder in a folder or under a name of transformers, whatever head it has.

    Raises CheckpointError, or DataError for a tokenizer that is missing or has no [MASK].
    """
    states, folder, longest = load_hidden(source, "model")
    tokenizers.token_ids(tokenizers.load_tokenizer(folder))
    model = states.model
    ends = torch.tensor([0, 2], dtype=torch.int32)
    with torch.no_grad():
        probe = states(torch.zeros(2, dtype=torch.int64), Layout(ends, 2, torch.arange(2, dtype=torch.int32)))
    widths = sorted({states.shape[1] for states in probe})
    if len(widths) > 1:
        raise CheckpointError(f"{folder} has layers of several widths, {widths}; an encoder must have one.")
    table = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    # a hub's cache calls its folder by a hash, the user by the name
    name = folder.absolute().name if Path(source).is_dir() else source
    return Layered(name, states, len(probe) - 1, widths[0], longest, folder, int(table), source)
