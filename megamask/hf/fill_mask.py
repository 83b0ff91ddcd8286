"""Asking an exported model for masked words, as a user of transformers would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from megamask.hf import lazy_transformers


def fill_masks(folder: Path, sentences: Sequence[str], top: int) -> list[list[tuple[str, float]]]:
    """For each sentence with one mask token, the ``top`` likeliest tokens with their probabilities."""
    tokenizer = lazy_transformers.load_tokenizer(folder)
    model, _ = lazy_transformers.load_model(lazy_transformers.AutoModelForMaskedLM, folder)
    fill = lazy_transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    answers = [fill(sentence, top_k=top) for sentence in sentences]
    return [[(_shown(tokenizer, int(one["token"])), float(one["score"])) for one in each] for each in answers]


def common_words(folder: Path, counts: Int64[np.ndarray, " V"], top: int) -> list[str]:
    """The ``top`` most frequent tokens, which is what a guess by frequency answers everywhere."""
    tokenizer = lazy_transformers.load_tokenizer(folder)
    return [_shown(tokenizer, int(number)) for number in np.argsort(-counts, kind="stable")[:top]]


def _shown(tokenizer: lazy_transformers.PreTrainedTokenizerBase, number: int) -> str:
    """The text of a token; in quotes, as it stands in the vocabulary, if it is blank or no whole character."""
    token = str(tokenizer.convert_ids_to_tokens(number))
    text = tokenizer.convert_tokens_to_string([token]).strip()
    return text if text and text.isprintable() and "\ufffd" not in text else repr(token)
