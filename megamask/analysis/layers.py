"""The states of any encoder after every layer: of a run of ours, or of a model of transformers.

Layer 0 is the embedding as it enters the first layer; the last layer includes the final norm. In between, ``modern``
has the residual stream, which no norm has touched, and ``bert`` has the output of a norm. The encoder of a run uses our
own code; every ``model``, an export too, uses transformers.
"""

from __future__ import annotations

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
from megamask.hf import lazy_transformers
from megamask.hf.masked_lm import max_length, pad_id
from megamask.hf.model_folder import fetch_model, load_pretrained
from megamask.hf.tensor_names import WEIGHTS
from megamask.model.encoder import Encoder
from megamask.model.padded_grids import PaddedGrids
from megamask.model.shape import SHAPE
from megamask.teacher import frozen_lm

OPTIONAL = ("pooler.",)
"""Modules behind the last layer, which masked language models are saved without."""


@runtime_checkable
class LayerStates(Protocol):
    """(tokens, layout) -> the states of every token, a matrix for each layer from the embedding on."""

    def __call__(self, tokens: Int64[Tensor, " T"], layout: Layout) -> Sequence[Float[Tensor, "T D"]]: ...


class OwnStates(nn.Module):
    """Our encoder, layer by layer."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Int64[Tensor, " T"], layout: Layout) -> list[Float[Tensor, "T D"]]:
        """The states of every token, layer by layer from the embedding on."""
        states = [self.encoder.embed(tokens, layout)]
        for layer in range(self.encoder.shape.num_layers):
            states.append(self.encoder.run(states[-1], layout, slice(layer, layer + 1)))
        return states


class HFStates(nn.Module):
    """An encoder of transformers, on padded batches, one for each group of sequences of similar length."""

    def __init__(self, model: lazy_transformers.PreTrainedModel, pad: int):
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, tokens: Int64[Tensor, " T"], layout: Layout) -> list[Float[Tensor, "T D"]]:
        """The states of every token, layer by layer from the embedding on."""
        padded, by_grid = PaddedGrids.by_length(layout), []
        for grid in padded.grids:
            ids = torch.where(grid.present, tokens[grid.index], self.pad)
            output = self.model(input_ids=ids, attention_mask=grid.present.long(), output_hidden_states=True)
            by_grid.append([states.flatten(0, 1) for states in output.hidden_states])
        return [torch.cat(layer).index_select(0, padded.cell) for layer in zip(*by_grid, strict=True)]


@dataclass(frozen=True)
class AnalyzedEncoder:
    """An encoder and what is needed to feed it.

    ``states`` is a `LayerStates`. ``longest`` is the longest sequence it can read, None without a limit; ``tokenizer``
    is the folder of its tokenizer; ``vocabulary`` is the number of rows of its token table.
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
    """Whether it was pretrained on sequences from which the [MASK] tokens were removed (MAE-LM)."""

    def fingerprint(self) -> str:
        """sha256 of all parameters, by name."""
        return frozen_lm.fingerprint(self.states.state_dict())


def open_run_encoder(path: Path, step: int | None = None) -> AnalyzedEncoder:
    """The encoder in a run folder (its checkpoint at ``step``, else the newest), a checkpoint, or initial weights.

    Raises CheckpointError for files that are missing or corrupt and tensors of another shape.
    """
    if not path.is_dir():
        raise CheckpointError(f"`run` must be a run folder or a checkpoint in one, but {path} is not a folder.")
    is_initial = (path / SHAPE).exists() and (path / WEIGHTS).exists()
    source = path if is_initial and step is None else format.find_checkpoint(path, step)
    model = frozen_lm.read_masked_lm(source, "run")
    encoder = getattr(model.states, "encoder", None)
    assert isinstance(encoder, Encoder)
    shape = encoder.shape
    run = path if source == path and is_initial else source.absolute().parent.parent
    name = run.name if is_initial else f"{run.name}, {source.name.replace('-', ' ')}"
    return AnalyzedEncoder(
        name, OwnStates(encoder), shape.num_layers, shape.hidden_size, shape.max_positions, model.tokenizer,
        shape.vocab_size, str(source), "decoder" in model.other_modules,
    )  # fmt: skip


def open_hf_encoder(source: str) -> AnalyzedEncoder:
    """The encoder in a folder or under a Hub name of transformers, whatever head it has.

    Raises CheckpointError, or DataError for a tokenizer that is missing or has no [MASK].
    """
    folder = fetch_model(source, "model")
    model = load_pretrained(lazy_transformers.AutoModel, folder, optional=OPTIONAL)
    if model.config.is_encoder_decoder or getattr(model.config, "is_decoder", False):
        raise CheckpointError(f"`model` must be an encoder, but {folder} ({model.config.model_type}) has a decoder.")
    states = HFStates(model, pad_id(model))
    tokenizers.token_ids(tokenizers.load_tokenizer(folder))
    with torch.no_grad():
        layers = states(torch.zeros(2, dtype=torch.int64), Layout.of(torch.tensor([0, 2]), 2, 2))
    widths = sorted({layer.shape[1] for layer in layers})
    if len(widths) > 1:
        raise CheckpointError(f"`model` must have layers of one width, but {folder} has the widths {widths}.")
    table = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    # the Hub's cache names its folders by hashes
    name = folder.absolute().name if Path(source).is_dir() else source
    return AnalyzedEncoder(name, states, len(layers) - 1, widths[0], max_length(model), folder, int(table), source)
