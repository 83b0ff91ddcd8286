"""The pseudo-log-likelihood of a sentence: the sum of the log-probabilities of its tokens, each predicted at [MASK].

Variants differ in what else is masked while a token is predicted:

- ``original``: nothing (Salazar et al. 2020, arXiv 1910.14659, equation 1).
- ``within_word``: the tokens after it in the same word (Kauf & Ivanova 2023, arXiv 2305.10588, PLL-word-l2r), so that
  the end of a word does not give away its beginning. Words are those of the tokenizer's pre-tokenizer, as there.

The tokens that the tokenizer adds around a sentence are visible and not scored; an unknown token is scored like any
other. The temperature is 1, and the sum is not divided by the length.

Cost: a forward pass for each scored token of a sentence, and for each variant where the masks differ. Equal inputs are
computed once. Inputs of equal length form a batch, so there is no padding. The last layer of our own encoder and the
logits are computed at [MASK] alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from megamask.batch import Layout
from megamask.hf import lazy_transformers
from megamask.teacher.frozen_lm import HiddenStatesFn, MaskedLM

Variant = Literal["original", "within_word"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

BATCH_TOKENS = 2048
"""Tokens of a batch. On a CPU larger batches are slower, because their activations leave its cache."""


@dataclass(frozen=True)
class TokenizedSentence:
    """The token ids of a sentence, with those that the tokenizer adds around it."""

    ids: tuple[int, ...]
    added: tuple[bool, ...]
    """Whether the tokenizer added the token, as it does [CLS] and [SEP]."""
    words: tuple[int | None, ...]
    """The number of the word of each token; None for added ones."""


class MaskedToken(NamedTuple):
    """A token that is predicted: the inputs of the model, the position in them, and the id of the token."""

    inputs: tuple[int, ...]
    position: int
    target: int


def tokenize_sentences(
    tokenizer: lazy_transformers.PreTrainedTokenizerBase, sentences: Sequence[str]
) -> list[TokenizedSentence]:
    """The tokens of each of ``sentences``, never truncated."""
    encoded = tokenizer(list(sentences), return_special_tokens_mask=True, truncation=False, verbose=False)
    return [
        TokenizedSentence(tuple(ids), tuple(map(bool, added)), tuple(encoded.word_ids(number)))
        for number, (ids, added) in enumerate(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True))
    ]


def masked_tokens(sentence: TokenizedSentence, variant: Variant, mask_id: int) -> list[MaskedToken]:
    """What the model must predict for the score of ``sentence``."""
    return [
        MaskedToken(_masked(sentence, position, variant, mask_id), position, target)
        for position, target in enumerate(sentence.ids)
        if not sentence.added[position]
    ]


def _masked(sentence: TokenizedSentence, position: int, variant: Variant, mask_id: int) -> tuple[int, ...]:
    ids, words = list(sentence.ids), sentence.words
    ids[position] = mask_id
    if variant == "within_word" and words[position] is not None:
        for later in range(position + 1, len(ids)):
            if words[later] == words[position]:
                ids[later] = mask_id
    return tuple(ids)


def sentence_scores(wanted: Sequence[Sequence[MaskedToken]], log_p: dict[MaskedToken, float]) -> list[float]:
    """The sum of log-probabilities of each sentence, in nats; rounded once, so the order of tokens does not matter."""
    return [math.fsum(log_p[token] for token in tokens) for tokens in wanted]


@torch.inference_mode()
def log_probabilities(model: MaskedLM, tokens: set[MaskedToken]) -> dict[MaskedToken, float]:
    """The natural log of the probability of each of ``tokens``.

    The softmax is computed in fp32. Batches are formed from the sorted inputs, so the result does not depend on the
    order of sentences.
    """
    in_order = sorted(tokens, key=lambda token: (len(token.inputs), token))
    log_p: dict[MaskedToken, float] = {}
    for length, same_length in groupby(in_order, key=lambda token: len(token.inputs)):
        rest, size = list(same_length), max(1, BATCH_TOKENS // length)
        for batch in (rest[start : start + size] for start in range(0, len(rest), size)):
            log_p.update(zip(batch, _predict(model, batch).tolist(), strict=True))
    return log_p


def _predict(model: MaskedLM, batch: Sequence[MaskedToken]) -> Float[Tensor, " n"]:
    """The log-probabilities of tokens whose inputs have one length."""
    device, length = model.weight.device, len(batch[0].inputs)
    numbers = {inputs: number for number, inputs in enumerate(dict.fromkeys(token.inputs for token in batch))}
    tokens = torch.tensor(list(numbers), device=device)
    ends = torch.arange(0, tokens.numel() + 1, length, device=device)
    layout = Layout.of(ends, tokens.numel(), length)
    flat = torch.tensor([numbers[token.inputs] * length + token.position for token in batch], device=device)
    rows, which = flat.unique(return_inverse=True)
    compute = model.states.at_few_rows if isinstance(model.states, HiddenStatesFn) else model.states
    logits = F.linear(compute(tokens.flatten(), layout, rows).float(), model.weight, model.bias)
    targets = torch.tensor([token.target for token in batch], device=device)
    return logits[which, targets] - logits.logsumexp(-1)[which]
