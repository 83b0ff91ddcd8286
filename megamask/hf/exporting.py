"""Export: a folder that ``from_pretrained`` loads, written only if transformers computes what the original does.

Needs both models in fp32 in the host's memory, and about a second for a small model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megamask.batch import Layout
from megamask.data.tokenizer import load_tokenizer
from megamask.errors import CheckpointError, ConfigError, must, raise_all
from megamask.hf import lazy_transformers, model_folder
from megamask.hf.card import CARD, RECORD, Card, is_of_run, render_card, write_record
from megamask.hf.config_json import write_config
from megamask.hf.encoder_and_head import encoder_and_head
from megamask.hf.encoding_check import SENTENCES
from megamask.hf.tensor_names import TOKENIZER_FILES, WEIGHTS, to_hf_weights
from megamask.hf.tokenizer_folder import export_tokenizer
from megamask.hf.weights import new_model_folder, save_weights
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import EncoderShape

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, with which an export is written."""


@dataclass(frozen=True)
class Exported:
    """The result of comparing an export with its original."""

    difference: float
    """The largest difference of logits."""
    notes: tuple[str, ...] = ()
    """A sentence for each change to the tokenizer."""


def export_model(
    weights: Mapping[str, Tensor],
    shape: EncoderShape,
    tokenizer_folder: Path,
    output: Path,
    *,
    card: Card,
    sentences: Sequence[str] = (),
    replace: bool = False,
) -> Exported:
    """Write a model that ``from_pretrained`` loads to ``output``, after comparing it with the original.

    ``weights`` are an objective's, by name; modules other than encoder and head are left out. ``sentences`` of the
    text are encoded by training's tokenizer and by the exported one. An earlier export of the same run is replaced,
    that of another run only with ``replace``; any other folder that is not empty is refused. Raises CheckpointError,
    with nothing written, if transformers computes other logits or encodes a text differently.
    """
    model = encoder_and_head(weights, shape, "the model to export")
    output = output.resolve()
    raise_all(ConfigError, _obstacles(output, card.run, replace))
    with new_model_folder(output) as temporary:
        notes = export_tokenizer(tokenizer_folder, temporary, shape.max_positions, sentences)
        tokenizer = model_folder.load_hf_tokenizer(temporary)
        if len(tokenizer) > shape.vocab_size:
            raise CheckpointError(
                f"The tokenizer in {tokenizer_folder} has {len(tokenizer)} tokens, but the model only "
                f"{shape.vocab_size}: they do not belong together."
            )
        write_config(shape, tokenizer, temporary)
        save_weights(to_hf_weights(weights, shape), temporary)
        (temporary / CARD).write_text(render_card(card, shape, load_tokenizer(tokenizer_folder)), encoding="utf-8")
        write_record(card, temporary)
        difference = _compare(*model, temporary, tokenizer)
    return Exported(difference, notes)


def _obstacles(output: Path, run: str, replace: bool) -> list[str]:
    if not output.exists():
        return []
    if not output.is_dir():
        return [must("output", "be a folder", str(output))]
    present = set(os.listdir(output))
    if other := sorted(present - {WEIGHTS, "config.json", CARD, RECORD, *TOKENIZER_FILES}):
        return [f"`output` is {output}, which is not an earlier export: it contains {other[0]}. Choose another folder."]
    if present and not replace and not is_of_run(output, run):
        return [
            f"`output` is {output}, which contains a model that is not an export of this run or was changed since. "
            "Choose another folder, or replace it with `--replace`."
        ]
    return []


@torch.no_grad()
def _compare(encoder: Encoder, head: MaskedLMHead, folder: Path, tokenizer) -> float:
    sequences = _random_input(encoder.shape) + _real_input(tokenizer, encoder.shape)
    own_logits = _own_logits(encoder, head, sequences)
    hf_logits = _hf_logits(folder, sequences, encoder.shape.pad_id)
    difference = max((a - b).abs().max().item() for a, b in zip(own_logits, hf_logits, strict=True))
    largest = max(1.0, max(logits.abs().max().item() for logits in own_logits))
    if not difference <= TOLERANCE * largest:  # also true for NaN
        raise CheckpointError(
            f"transformers computes logits that differ from ours by {difference:.3g} (the largest logit is "
            f"{largest:.3g}), so nothing was written. This is a bug, or the weights overflow in the forward pass."
        )
    return difference


def _random_input(shape: EncoderShape) -> list[Tensor]:
    """Sequences of several lengths, one longer than a local window if the model has such layers."""
    generator = torch.Generator().manual_seed(0)
    longest = min(shape.max_positions, max(96, shape.local_window + 32 if shape.global_every > 1 else 0))
    lengths = sorted({1, 2, longest // 3, longest} - {0})
    sequences = [torch.randint(shape.vocab_size, (length,), generator=generator) for length in lengths]
    if shape.position_offset:  # transformers does not count a padding token inside a sequence
        sequences = [torch.where(ids == shape.pad_id, (ids + 1) % shape.vocab_size, ids) for ids in sequences]
    return sequences


def _real_input(tokenizer: lazy_transformers.PreTrainedTokenizerBase, shape: EncoderShape) -> list[Tensor]:
    """A few sentences, each with one token masked."""
    sequences = []
    for sentence in SENTENCES:
        ids = tokenizer(sentence, truncation=True, max_length=shape.max_positions, return_tensors="pt")["input_ids"][0]
        ids[len(ids) // 2] = tokenizer.mask_token_id
        sequences.append(ids)
    return sequences


def _own_logits(encoder: Encoder, head: MaskedLMHead, sequences: list[Tensor]) -> list[Tensor]:
    lengths = [len(sequence) for sequence in sequences]
    layout = Layout.of(torch.tensor([0, *lengths]).cumsum(0), sum(lengths), max(lengths))
    states = encoder.run(encoder.embed(torch.cat(sequences), layout), layout)
    return list(head.logits(states).split(lengths))


def _hf_logits(folder: Path, sequences: list[Tensor], pad: int) -> list[Tensor]:
    model = model_folder.load_pretrained(lazy_transformers.AutoModelForMaskedLM, folder)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
    present = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=padded, attention_mask=present).logits
    return [row[:length] for row, length in zip(logits, lengths.tolist(), strict=True)]
