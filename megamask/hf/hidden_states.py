"""Any encoder of transformers, asked for its states after every layer, on packed rows.

Runs on padded batches, one for each group of sequences of like length. No code that comes with a model is run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.batch import Layout
from megamask.errors import CheckpointError
from megamask.hf import lazy_transformers
from megamask.hf.importing import fetch_model
from megamask.hf.masked_lm import max_length, model_type
from megamask.hf.weights import read_hf_tensors

UNUSED = ("pooler.",)
"""Parts that lie behind the last layer; masked language models are saved without them."""


class HiddenStates(nn.Module):
    """``states``: after the embedding, then after each layer, the last one as the model hands it on."""

    def __init__(self, model: lazy_transformers.PreTrainedModel, pad: int):
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, tokens: Int64[Tensor, " T"], layout: Layout) -> list[Float[Tensor, "T D"]]:
        """The states of every row, layer by layer from the embedding."""
        groups = []
        for group in layout.groups:
            ids = torch.where(group.present, tokens[group.rows], self.pad)
            said = self.model(input_ids=ids, attention_mask=group.present.long(), output_hidden_states=True)
            groups.append([states.flatten(0, 1) for states in said.hidden_states])
        return [torch.cat(parts).index_select(0, layout.grids.places) for parts in zip(*groups, strict=True)]


def load_hidden(source: str | Path, setting: str) -> tuple[HiddenStates, Path, int | None]:
    """The encoder that ``source`` names, in 32 bits on the CPU, its folder, and its longest sequence if any.

    Raises CheckpointError, which calls it by the name of the ``setting``, for what cannot be read or is no encoder.
    """
    folder = fetch_model(source, setting)
    if model_type(folder) is None:
        raise CheckpointError(f"`{setting}` is {folder}, which is no model of transformers: it has no config.json.")
    for name, tensor in read_hf_tensors(folder).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{folder} holds numbers in the tensor {name} that are not finite.")
    model, report = lazy_transformers.load_model(lazy_transformers.AutoModel, folder)
    lacking = sorted(name for name in map(str, report["missing_keys"]) if not name.startswith(UNUSED))
    if lacking or report["mismatched_keys"]:
        wrong = lacking[:3] or sorted(map(str, report["mismatched_keys"]))[:3]
        raise CheckpointError(f"{folder} is no whole model; these tensors are missing or of another shape: {wrong}.")
    if model.config.is_encoder_decoder or getattr(model.config, "is_decoder", False):
        raise CheckpointError(f"{folder} ({model.config.model_type}) has a decoder; `{setting}` must be an encoder.")
    pad = model.config.pad_token_id
    return HiddenStates(model.eval(), pad if isinstance(pad, int) else 0), folder, max_length(model)
