"""Any masked language model of transformers as a module that returns the states before its output matrix.

The output embedding is replaced by the identity, so that the model returns those states where it would return logits.
When a model is loaded, its states times that matrix plus bias are compared with its own logits; a model for which they
differ is refused. The model runs on padded batches, one for each group of sequences of similar length.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.batch import Layout
from megamask.errors import ConfigError
from megamask.hf import lazy_transformers
from megamask.hf.model_folder import load_pretrained
from megamask.model.padded_grids import PaddedGrids

TOLERANCE = 1e-4
"""Largest difference from the model's own logits, relative to the largest logit."""


class HFMaskedLM(nn.Module):
    """A model whose output embedding is the identity, applied to packs.

    ``one_batch``: pad all sequences to the longest, so that ranks with other lengths make the same calls, as ZeRO
    stage 3 needs. Otherwise there is one batch for each group of similar length, which pads less.
    """

    def __init__(self, model: lazy_transformers.PreTrainedModel, pad: int):
        super().__init__()
        self.model, self.pad, self.one_batch = model, pad, False

    def forward(self, tokens: Int64[Tensor, " T"], layout: Layout, rows: Int64[Tensor, " Q"]) -> Float[Tensor, "Q D"]:
        """The states at ``rows`` from which the output matrix makes logits."""
        padded = PaddedGrids.single(layout) if self.one_batch else PaddedGrids.by_length(layout)
        states = []
        for grid in padded.grids:
            ids = torch.where(grid.present, tokens[grid.index], self.pad)
            states.append(self.model(input_ids=ids, attention_mask=grid.present.long()).logits.flatten(0, 1))
        return torch.cat(states).index_select(0, padded.cell[rows])


def load_hf_masked_lm(folder: Path) -> tuple[HFMaskedLM, Float[Tensor, "V D"], Float[Tensor, " V"], int | None]:
    """The model in ``folder`` in fp32 on the CPU, its output matrix and bias, and its longest sequence if limited.

    Raises CheckpointError for files that are missing, corrupt or not a masked language model, ConfigError for a model
    that ends in more than one matrix and its bias.
    """
    model = load_pretrained(lazy_transformers.AutoModelForMaskedLM, folder)
    name, decoder = _output_matrix(model, folder)
    longest, pad = max_length(model), pad_id(model)
    tokens, layout = _test_input(len(decoder.weight), pad, longest)
    try:
        expected = _logits(model, tokens)
    except Exception as error:  # sizes that do not fit together fail only in the forward pass
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"The forward pass of the model in {folder} failed: {reason}") from None
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Identity())
    weight = decoder.weight.detach()
    bias = torch.zeros(len(weight)) if decoder.bias is None else decoder.bias.detach()
    states = HFMaskedLM(model, pad)
    _compare(states, weight, bias, tokens, layout, expected, folder)
    return states, weight, bias, longest


def _output_matrix(model: lazy_transformers.PreTrainedModel, folder: Path) -> tuple[str, nn.Linear]:
    decoder = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    if not isinstance(decoder, nn.Linear) or not name:
        raise ConfigError(
            f"{folder} ({model.config.model_type}) has no output embedding that is a single matrix, so the states "
            "before it cannot be read. Use another model."
        )
    return name, decoder


def max_length(model: lazy_transformers.PreTrainedModel) -> int | None:
    """How many positions the model has; RoBERTa and its relatives count from the padding token's id."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    positions = getattr(model.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def pad_id(model: lazy_transformers.PreTrainedModel) -> int:
    """The id of the padding token, or 0; attention ignores padding."""
    pad = model.config.pad_token_id
    return pad if isinstance(pad, int) else 0


def _test_input(vocab_size: int, pad: int, longest: int | None) -> tuple[Int64[Tensor, "2 L"], Layout]:
    """Two random sequences of the same length, without the padding token."""
    length = min(longest or 16, 16)
    tokens = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    tokens = torch.where(tokens == pad, (pad + 1) % vocab_size, tokens)
    return tokens, Layout.of(torch.tensor([0, length, 2 * length]), 2 * length, length)


@torch.no_grad()
def _logits(model: lazy_transformers.PreTrainedModel, tokens: Tensor) -> Float[Tensor, "T V"]:
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.flatten(0, 1)


@torch.no_grad()
def _compare(model: HFMaskedLM, weight, bias, tokens: Tensor, layout: Layout, expected: Tensor, folder: Path) -> None:
    model_type = model.model.config.model_type
    try:
        states = model(tokens.flatten(), layout, torch.arange(tokens.numel()))
        difference = (nn.functional.linear(states, weight, bias) - expected).abs().max().item()
    except Exception as error:  # such as a bias that is added after the matrix and no longer fits
        raise ConfigError(
            f"{folder} ({model_type}) does more at its end than multiply by one matrix and add its bias ({error}), so "
            "the states before it cannot be read. Use another model."
        ) from None
    largest = max(1.0, expected.abs().max().item())
    if not difference <= TOLERANCE * largest:  # also true for NaN
        raise ConfigError(
            f"{folder} ({model_type}) computes logits that differ by {difference:.3g} from its states times its output "
            f"embedding (the largest logit is {largest:.3g}), because it does more at its end or its logits are not "
            "finite. It cannot be a teacher. Use another model."
        )
