"""Any masked language model of transformers, asked for the states that its last matrix turns into logits.

The output embedding is replaced by the identity, so that what the model calls logits are the states before it. That
this is so is not taken for granted: at load time states times that matrix, plus its bias, are compared with what the
model itself computes, and a model for which they differ is refused. Runs on padded batches, one for each group of
sequences of like length.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.batch import Layout, LengthGroup
from megamask.errors import CheckpointError, ConfigError, listed
from megamask.hf import lazy_transformers
from megamask.hf.weights import read_hf_tensors
from megamask.storage import strict_json

TOLERANCE = 1e-4
"""Largest difference from the model's own logits, as a share of the largest logit."""


class HFMaskedLM(nn.Module):
    """A model whose output embedding is the identity, on packed rows.

    ``one_batch``: pad all sequences to the longest, so that ranks with other lengths make the same calls, as ZeRO
    stage 3 needs; else a batch for each group of like length, which pads less.
    """

    def __init__(self, model: lazy_transformers.PreTrainedModel, pad: int):
        super().__init__()
        self.model, self.pad, self.one_batch = model, pad, False

    def forward(self, tokens: Int64[Tensor, " T"], layout: Layout, rows: Int64[Tensor, " Q"]) -> Float[Tensor, "Q D"]:
        """The states at ``rows`` that the output embedding would turn into logits."""
        groups = (_one_group(layout),) if self.one_batch else layout.groups
        states, places = [], torch.empty_like(tokens)
        begin = 0
        for group in groups:
            ids = torch.where(group.present, tokens[group.rows], self.pad)
            states.append(self.model(input_ids=ids, attention_mask=group.present.long()).logits.flatten(0, 1))
            flat = group.present.flatten().nonzero().squeeze(1)
            places[group.rows.flatten()[flat]] = flat + begin
            begin += group.rows.numel()
        return torch.cat(states).index_select(0, places[rows])


def _one_group(layout: Layout) -> LengthGroup:
    """All sequences that are not empty as one padded grid."""
    there = (layout.lengths > 0).nonzero().squeeze(1)
    lengths, starts = layout.lengths[there], layout.cu_seqlens[there].long()
    places = torch.arange(int(lengths.max()), device=lengths.device)
    present = places < lengths[:, None]
    return LengthGroup(torch.where(present, starts[:, None] + places, starts[:, None]), present)


def load_hf_masked_lm(folder: Path) -> tuple[HFMaskedLM, Float[Tensor, "V D"], Float[Tensor, " V"], int | None]:
    """The model in ``folder`` in 32 bits on the CPU, its output matrix and bias, and its longest sequence if any.

    Raises CheckpointError, naming what cannot be read, or ConfigError for a model of another kind: no masked one,
    or one that ends in more than a matrix. No code that comes with the model is run.
    """
    read_hf_tensors(folder)  # for the sentence if a file is missing or damaged
    model = _from_folder(folder)
    model.eval()
    name, decoder = _decoder(model, folder)
    most = max_length(model)
    pad = _number(model.config.pad_token_id)
    tokens, layout = _probe(len(decoder.weight), pad, most)
    try:
        expected = _logits(model, tokens)
    except Exception as error:  # sizes that do not go together come to light when they are computed with
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{folder} is no model that can be asked: {reason}") from None
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Identity())
    weight = decoder.weight.detach()
    bias = torch.zeros(len(weight)) if decoder.bias is None else decoder.bias.detach()
    found = HFMaskedLM(model, pad)
    _compare(found, weight, bias, tokens, layout, expected, folder)
    return found, weight, bias, most


def _from_folder(folder: Path) -> lazy_transformers.PreTrainedModel:
    try:
        model, report = lazy_transformers.load_model(lazy_transformers.AutoModelForMaskedLM, folder)
    except lazy_transformers.Unloadable as error:
        raise ConfigError(f"{folder} is no masked language model that transformers can load: {error.why}") from None
    check_whole(report, folder)
    return model


def check_whole(report: dict, folder: Path) -> None:
    """CheckpointError if transformers made up tensors of the masked language model in ``folder``, by its report."""
    wrong = {
        why: sorted(map(str, report[key]))
        for key, why in (("missing_keys", "it lacks"), ("mismatched_keys", "of another shape it has"))
        if report[key]
    }
    if wrong:
        kind = "no masked language model, or not the whole of one"
        said = "; ".join(f"{why} {listed(names, 'tensor')}" for why, names in wrong.items())
        raise CheckpointError(f"{folder} is {kind}: {said}.")


def _decoder(model: lazy_transformers.PreTrainedModel, folder: Path) -> tuple[str, nn.Linear]:
    decoder = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    if not isinstance(decoder, nn.Linear) or not name:
        raise ConfigError(
            f"{folder} ({model.config.model_type}) has no output embedding that is one matrix, so its states cannot "
            "be had. Use another model."
        )
    return name, decoder


def max_length(model: lazy_transformers.PreTrainedModel) -> int | None:
    """How many positions the model has; RoBERTa and its kin begin to count behind the padding token's id."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    said = getattr(model.config, "max_position_embeddings", None)
    return said if isinstance(said, int) and said > 0 else None


def _number(pad: object) -> int:
    return pad if isinstance(pad, int) else 0


def _probe(vocabulary: int, pad: int, longest: int | None) -> tuple[Int64[Tensor, "2 L"], Layout]:
    """Two random sequences of the same length, without the padding token."""
    length = min(longest or 16, 16)
    tokens = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    tokens = torch.where(tokens == pad, (pad + 1) % vocabulary, tokens)
    ends = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    return tokens, Layout(ends, length, torch.arange(length, dtype=torch.int32).repeat(2))


@torch.no_grad()
def _logits(model: lazy_transformers.PreTrainedModel, tokens: Tensor) -> Float[Tensor, "T V"]:
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.flatten(0, 1)


@torch.no_grad()
def _compare(model: HFMaskedLM, weight, bias, tokens: Tensor, layout: Layout, expected: Tensor, folder: Path) -> None:
    kind = model.model.config.model_type
    try:
        states = model(tokens.flatten(), layout, torch.arange(tokens.numel()))
        difference = (nn.functional.linear(states, weight, bias) - expected).abs().max().item()
    except Exception as error:  # such as a bias added behind the matrix, which no longer fits
        raise ConfigError(
            f"{folder} ({kind}) does something else than one matrix and its bias at its end ({error}), so its states "
            "cannot be had. Use another model."
        ) from None
    largest = max(1.0, expected.abs().max().item())
    if not difference <= TOLERANCE * largest:  # so written that NaN is refused
        raise ConfigError(
            f"{folder} ({kind}) computes logits that differ by {difference:.3g} from its states times its output "
            f"embedding (the largest is {largest:.3g}), so it cannot be a teacher. Its weights may hold numbers that "
            "are not finite, or it does something else at its end."
        )


def model_type(folder: Path) -> str | None:
    """What the folder's config.json says the model is; None if it says nothing that can be read."""
    try:
        said = strict_json.read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    kind = said.get("model_type") if isinstance(said, dict) else None
    return kind if isinstance(kind, str) else None
