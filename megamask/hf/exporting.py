"""Export: a folder that ``from_pretrained`` loads, published only if it computes what the original does.

Takes both models in 32 bits in a CPU's memory, one after the other, and a second or so for a small model.
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
from megamask.errors import CheckpointError, ConfigError, listed, must, raise_all
from megamask.hf import lazy_transformers
from megamask.hf.card import CARD, RECORD, Card, is_of_run, render_card, write_record
from megamask.hf.config_json import write_config
from megamask.hf.encoding_check import SENTENCES
from megamask.hf.tensor_names import DECODER, EMBEDDING, TOKENIZER_FILES, WEIGHTS, bare, misfits, to_theirs
from megamask.hf.tokenizer_files import export_tokenizer
from megamask.hf.weights import save_weights
from megamask.hf.whole import atomic_folder
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import EncoderShape

TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit, at which an export is published."""


@dataclass(frozen=True)
class Exported:
    """What was found when an export was compared with its original."""

    difference: float
    """The largest difference of logits."""
    notes: tuple[str, ...] = ()
    """A sentence for what was added to the tokenizer."""


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
    """Write what ``from_pretrained`` loads to ``output``, after it was compared with the original.

    ``weights`` are an objective's, by name; parts beside encoder and head are left out. ``sentences`` of the text are
    encoded by training's tokenizer and the exported one. An earlier export of the same run is replaced, that of
    another only with ``replace``; any other folder that is not empty is refused. Raises CheckpointError, with nothing
    written, if the model that transformers loads does not compute what ours does, or encodes a text differently.
    """
    weights = {name: tensor for name, tensor in weights.items() if name.startswith(("encoder.", "head."))}
    weights.pop(DECODER, None)
    raise_all(CheckpointError, misfits(weights, shape, "the model to be exported"))
    output = output.resolve()
    raise_all(ConfigError, _obstacles(output, card.run, replace))
    with atomic_folder(output) as temporary:
        notes = export_tokenizer(tokenizer_folder, temporary, shape.max_positions, sentences)
        tokenizer = lazy_transformers.load_tokenizer(temporary)
        if len(tokenizer) > shape.vocab_size:
            raise CheckpointError(
                f"The tokenizer in {tokenizer_folder} has {len(tokenizer)} tokens, but the model only "
                f"{shape.vocab_size}: they do not belong together."
            )
        write_config(shape, tokenizer, temporary)
        save_weights(to_theirs(weights, shape), temporary)
        (temporary / CARD).write_text(render_card(card, shape, load_tokenizer(tokenizer_folder)), encoding="utf-8")
        write_record(card, temporary)
        difference = _compare(weights, shape, temporary, tokenizer)
    return Exported(difference, notes)


def _obstacles(output: Path, run: str, replace: bool) -> list[str]:
    ours = {WEIGHTS, "config.json", CARD, RECORD, *TOKENIZER_FILES}
    if not output.exists():
        return []
    if not output.is_dir():
        return [must("output", "be a folder", str(output))]
    present = set(os.listdir(output))
    if strange := sorted(present - ours):
        return [f"`output` is {output}, which holds {strange[0]}, so it is no earlier export. Choose another folder."]
    if present and not replace and not is_of_run(output, run):
        return [
            f"`output` is {output}, which holds a model that is no export of this run, or was changed since. Choose "
            "another folder, or replace it with `--replace`."
        ]
    return []


@torch.no_grad()
def _compare(weights: Mapping[str, Tensor], shape: EncoderShape, folder: Path, tokenizer) -> float:
    sequences = _random_input(shape) + _real_input(tokenizer, shape)
    ours = _our_logits(weights, shape, sequences)
    theirs = _their_logits(folder, sequences, shape.pad_id)
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    largest = max(1.0, max(logits.abs().max().item() for logits in ours))
    if not difference <= TOLERANCE * largest:  # so written that NaN is refused
        raise CheckpointError(
            f"transformers computes logits that differ from ours by {difference:.3g} (the largest is {largest:.3g}), "
            f"so nothing was written. The weights may hold numbers that are not finite, or this is a bug."
        )
    return difference


def _random_input(shape: EncoderShape) -> list[Tensor]:
    """Sequences of several lengths, one longer than a local window where there are such layers."""
    draws = torch.Generator().manual_seed(0)
    longest = min(shape.max_positions, max(96, shape.local_window + 32 if shape.global_every > 1 else 0))
    lengths = sorted({1, 2, longest // 3, longest} - {0})
    return [torch.randint(shape.vocab_size, (length,), generator=draws) for length in lengths]


def _real_input(tokenizer: lazy_transformers.PreTrainedTokenizerBase, shape: EncoderShape) -> list[Tensor]:
    """A few sentences, each with a word masked."""
    found = []
    for sentence in SENTENCES:
        ids = tokenizer(sentence, truncation=True, max_length=shape.max_positions, return_tensors="pt")["input_ids"][0]
        ids[len(ids) // 2] = tokenizer.mask_token_id
        found.append(ids)
    return found


def _our_logits(weights: Mapping[str, Tensor], shape: EncoderShape, sequences: list[Tensor]) -> list[Tensor]:
    model = bare(shape)
    wide = {name: tensor.float() for name, tensor in weights.items()}
    model.load_state_dict(wide | {DECODER: wide[EMBEDDING]}, assign=True)
    model.eval()
    lengths = [len(sequence) for sequence in sequences]
    layout = Layout(
        torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), torch.cat([torch.arange(n) for n in lengths]).int()
    )
    encoder, head = model["encoder"], model["head"]
    assert isinstance(encoder, Encoder) and isinstance(head, MaskedLMHead)
    states = encoder.run(encoder.embed(torch.cat(sequences), layout), layout)
    return list(head.logits(states).split(lengths))


def _their_logits(folder: Path, sequences: list[Tensor], pad: int) -> list[Tensor]:
    model, report = lazy_transformers.load_model(lazy_transformers.AutoModelForMaskedLM, folder)
    wrong = [f"{key}: {listed(sorted(map(str, found)))}" for key, found in report.items() if found]
    if wrong:
        raise CheckpointError(f"transformers did not find in the export what it looks for: {'; '.join(wrong)}.")
    model.eval()
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
    present = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=padded, attention_mask=present).logits
    return [row[:length] for row, length in zip(logits, lengths.tolist(), strict=True)]
