"""Minimal pairs (BLiMP, Warstadt et al. 2020): does a model score the acceptable sentence above the other one?

A score is a pseudo-log-likelihood in either variant of `pseudo_log_likelihood`. A pair counts 1 if the acceptable
sentence scores higher, 0 if it scores lower, and 0.5 for a tie, so a scorer that does not look at the sentence gets
exactly 0.5. The result is the mean over paradigms of the accuracy within each.

Two scores tie if they differ by at most `TIE`. Sums in fp32 differ in their last bits with the batch that a sentence is
in; without a threshold this noise would decide pairs whose scores are equal, such as two orders of the same words for
a model that counts words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from megamask.errors import CheckpointError, DataError
from megamask.evaluation.encoder import EncoderFolder
from megamask.evaluation.outcome import Outcome
from megamask.evaluation.pseudo_log_likelihood import (
    VARIANTS,
    MaskedToken,
    TokenizedSentence,
    Variant,
    log_probabilities,
    masked_tokens,
    sentence_scores,
    tokenize_sentences,
)
from megamask.evaluation.settings import EvaluateConfig
from megamask.evaluation.tasks import Examples, TaskData
from megamask.hf.model_folder import load_hf_tokenizer
from megamask.runtime import ranks
from megamask.runtime.progress_bar import ProgressBar
from megamask.teacher.frozen_lm import MaskedLM, read_masked_lm

TIE = 1e-4
"""Nats. Far above the noise of fp32, which is about 1e-5, and far below the usual difference of a few nats."""


def score_pairs(encoder: EncoderFolder, data: TaskData, config: EvaluateConfig) -> dict[str, Outcome]:
    """The accuracy of the masked language model in ``encoder.folder`` on the pairs of ``data.test``, by variant.

    With ``config.max_pairs``, the first pairs of each paradigm alone, in their order. `within_word` is left out, and
    ``metrics["without_words"]`` is 1, if the tokenizer does not separate words. Raises CheckpointError for a folder
    without a complete masked language model or without a mask token, DataError for sentences that it cannot read.
    """
    pairs = first_of_each_group(data.test, config.max_pairs)
    tokenizer = load_hf_tokenizer(encoder.folder)
    if tokenizer.mask_token_id is None:
        raise CheckpointError(f"The tokenizer in {encoder.folder} has no mask token, so no token can be predicted.")
    model = _on_device(read_masked_lm(encoder.folder, "model"))
    sentences = tokenize_sentences(tokenizer, [text for texts in pairs.texts for text in texts])
    _check(sentences, model, encoder.folder)
    separated = any(len({word for word in sentence.words if word is not None}) > 1 for sentence in sentences)
    variants = VARIANTS if separated else VARIANTS[:1]
    scores, inputs = _scores(model, pairs, sentences, variants, tokenizer.mask_token_id)
    metrics = {
        "tokens": sum(not added for sentence in sentences for added in sentence.added),
        "unknown_tokens": sum(sentence.ids.count(tokenizer.unk_token_id) for sentence in sentences),
        "inputs": inputs,
        "without_words": float(not separated),
    }
    return {variant: pair_outcome(values, pairs.groups, metrics) for variant, values in scores.items()}


def first_of_each_group(examples: Examples, count: int | None) -> Examples:
    """The first ``count`` examples of each group, in their order; all if it is None."""
    chosen = sorted(number for members in _members(examples.groups).values() for number in members[:count])
    return replace(
        examples,
        texts=tuple(examples.texts[number] for number in chosen),
        labels=examples.labels[chosen],
        groups=tuple(examples.groups[number] for number in chosen),
    )


def pair_outcome(
    scores: Float[np.ndarray, "n 2"], groups: Sequence[str], metrics: Mapping[str, float] | None = None
) -> Outcome:
    """The outcome for pairs with ``scores`` of the acceptable and the other sentence; ``groups`` are their paradigms.

    A pair with a score that is NaN or Inf counts as a tie, and the run as collapsed.
    """
    difference = scores[:, 0] - scores[:, 1]
    finite = np.isfinite(difference)
    tied = ~finite | (np.abs(difference) <= TIE)
    predictions = np.where(tied, 0.5, (difference > 0).astype(float))
    accuracies = {group: float(predictions[numbers].mean()) for group, numbers in _members(groups).items()}
    counts = {"pairs": len(predictions), "ties": int(tied.sum()), "not_finite": int((~finite).sum())}
    collapsed = ""
    if not finite.all():
        collapsed = f"The scores of {counts['not_finite']} of {counts['pairs']} pairs are NaN or Inf."
    elif tied.all():
        collapsed = "All pairs are ties: the scores do not depend on the sentence."
    return Outcome(
        predictions,
        {"pair_accuracy": float(np.mean(list(accuracies.values())))},
        collapsed,
        {**(metrics or {}), **counts, **{f"paradigm/{group}": value for group, value in accuracies.items()}},
    )


def _scores(
    model: MaskedLM, pairs: Examples, sentences: Sequence[TokenizedSentence], variants: Sequence[Variant], mask_id: int
) -> tuple[dict[Variant, Float[np.ndarray, "n 2"]], int]:
    """The scores of both sentences of each pair, and the number of distinct inputs; paradigm by paradigm."""
    scores: dict[Variant, np.ndarray] = {variant: np.empty((len(pairs), 2)) for variant in variants}
    inputs = 0
    with ProgressBar("minimal pairs", len(pairs), "pair") as bar:
        for numbers in _members(pairs.groups).values():
            of_group = [sentences[2 * number + side] for number in numbers for side in (0, 1)]
            wanted = {variant: [masked_tokens(each, variant, mask_id) for each in of_group] for variant in variants}
            distinct: set[MaskedToken] = {token for lists in wanted.values() for tokens in lists for token in tokens}
            log_p = log_probabilities(model, distinct)
            inputs += len({token.inputs for token in distinct})
            for variant in variants:
                scores[variant][numbers] = np.reshape(sentence_scores(wanted[variant], log_p), (-1, 2))
            bar.update(len(numbers))
    return scores, inputs


def _members(groups: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the members of each group."""
    members: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    return members


def _check(sentences: Sequence[TokenizedSentence], model: MaskedLM, folder: Path) -> None:
    longest = max(len(sentence.ids) for sentence in sentences)
    if model.longest is not None and longest > model.longest:
        count = sum(len(sentence.ids) > model.longest for sentence in sentences)
        raise DataError(
            f"{count} of {len(sentences)} sentences have more tokens than {folder} reads: the longest has {longest}, "
            f"the model takes {model.longest}. A shortened sentence would have another score. Leave these pairs out."
        )
    largest = max(max(sentence.ids) for sentence in sentences)
    if largest >= len(model.weight):
        raise CheckpointError(
            f"The tokenizer in {folder} made the id {largest}, but the model predicts {len(model.weight)} tokens: they "
            "do not belong together."
        )


def _on_device(model: MaskedLM) -> MaskedLM:
    device = ranks.device()
    return replace(
        model, states=model.states.to(device).eval(), weight=model.weight.to(device), bias=model.bias.to(device)
    )
