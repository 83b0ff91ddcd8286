"""Asking an exported model for masked words, as a user of transformers would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from megamask.hf import library


def fill_masks(folder: Path, sentences: Sequence[str], top: int) -> list[list[tuple[str, float]]]:
    """For each sentence with one [MASK], the ``top`` likeliest tokens with their probabilities."""
    tokenizer = library.load_tokenizer(folder)
    model, _ = library.load_model(library.AutoModelForMaskedLM, folder)
    fill = library.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    found = []
    for sentence in sentences:
        answers = fill(sentence.replace("[MASK]", tokenizer.mask_token), top_k=top)
        found.append([(str(answer["token_str"]).strip(), float(answer["score"])) for answer in answers])
    return found


def common_words(folder: Path, counts: Int64[np.ndarray, " V"], top: int) -> list[str]:
    """The ``top`` most frequent tokens, which is what a guess by frequency answers everywhere."""
    tokenizer = library.load_tokenizer(folder)
    tokens = [str(tokenizer.convert_ids_to_tokens(int(i))) for i in np.argsort(-counts, kind="stable")[:top]]
    return [tokenizer.convert_tokens_to_string([token]).strip() for token in tokens]
