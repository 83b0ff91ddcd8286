"""Texts as batches of token ids, and the vector of a text: that of its first token, or the mean over its tokens.

Batches hold texts of similar length, padded on the right to the longest of the batch. Truncated texts are counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megamask.evaluation.settings import Pooling
from megamask.hf.masked_lm import pad_id

TOKENS_PER_BATCH = 2048
"""Of features. On one core, 512 to 4,096 tokens took equal time, 8,192 half as much again."""


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of texts or pairs of texts, with special tokens."""

    ids: tuple[list[int], ...]
    types: tuple[list[int], ...]
    """0 for tokens of the first text of a pair, 1 for those of the second; empty if the model does not read them."""
    truncated: int
    """Texts that were longer than the limit."""

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each text."""
        return [len(ids) for ids in self.ids]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, texts: Sequence[tuple[str, ...]], longest: int
) -> EncodedTexts:
    """One or two texts each as at most ``longest`` tokens; of a pair, the longer text is cut first."""
    types = reads_token_types(model)
    columns = [list(column) for column in zip(*texts, strict=True)] or [[]]
    if not columns[0]:
        return EncodedTexts((), (), 0)

    def tokenize(rows: Sequence[int], **options: object) -> tuple[list[list[int]], list[list[int]]]:
        parts = [[column[row] for row in rows] for column in columns]
        encoded = tokenizer(*parts, return_attention_mask=False, return_token_type_ids=types, verbose=False, **options)
        return encoded["input_ids"], encoded["token_type_ids"] if types else []

    ids, kinds = tokenize(range(len(texts)))
    too_long = [row for row, sequence in enumerate(ids) if len(sequence) > longest]
    if too_long:
        shorter, shorter_kinds = tokenize(too_long, truncation="longest_first", max_length=longest)
        for at, row in enumerate(too_long):
            ids[row] = shorter[at]
            if types:
                kinds[row] = shorter_kinds[at]
    return EncodedTexts(tuple(ids), tuple(kinds), len(too_long))


def pad_texts(texts: EncodedTexts, rows: Sequence[int], pad: int) -> dict[str, Tensor]:
    """The inputs of a model for some of the texts, (rows, longest of them)."""
    length = max(len(texts.ids[row]) for row in rows)
    batch = {"input_ids": torch.full((len(rows), length), pad), "attention_mask": torch.zeros(len(rows), length).long()}
    if texts.types:
        batch["token_type_ids"] = torch.zeros_like(batch["attention_mask"])
    for at, row in enumerate(rows):
        ids = texts.ids[row]
        batch["input_ids"][at, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][at, : len(ids)] = 1
        if texts.types:
            batch["token_type_ids"][at, : len(ids)] = torch.tensor(texts.types[row])
    return batch


def length_batches(lengths: Sequence[int], tokens: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """All rows in batches of at most ``tokens`` tokens with padding, the shortest first; a longer row is alone."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[row] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pool_states(states: Float[Tensor, "B L D"], present: Bool[Tensor, "B L"], pooling: Pooling) -> Float[Tensor, "B D"]:
    """The state of the first token, or the mean over all tokens, special ones included and padding not."""
    if pooling == "first":
        return states[:, 0]
    weights = present.to(states.dtype)
    return torch.einsum("bld,bl->bd", states, weights) / weights.sum(1, keepdim=True)


@torch.inference_mode()
def text_features(model: PreTrainedModel, texts: EncodedTexts) -> dict[Pooling, Float[np.ndarray, "n D"]]:
    """The vectors of all texts by both kinds of pooling, in fp32, from one forward pass without dropout."""
    device, pad = model.device, pad_id(model)
    poolings: tuple[Pooling, ...] = ("first", "mean")
    features = {pooling: np.empty((len(texts.ids), model.config.hidden_size), np.float32) for pooling in poolings}
    model.eval()
    for rows in length_batches(texts.lengths):
        batch = {name: values.to(device) for name, values in pad_texts(texts, rows, pad).items()}
        states = model(**batch).last_hidden_state
        for pooling, vectors in features.items():
            vectors[rows] = pool_states(states, batch["attention_mask"].bool(), pooling).float().cpu().numpy()
    return features


def reads_token_types(model: PreTrainedModel) -> bool:
    """Whether the model distinguishes the texts of a pair; RoBERTa takes token types but has only one."""
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return takes and getattr(model.config, "type_vocab_size", 0) > 1
