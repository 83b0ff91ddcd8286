"""What a model of transformers predicts: tokens in the place of [MASK], and the entropy of each prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.errors import DataError
from megamask.hf import lazy_transformers
from megamask.hf.masked_lm import max_length
from megamask.hf.model_folder import load_hf_tokenizer, load_pretrained
from megamask.runtime.progress_bar import ProgressBar

COPIES = 32
"""Copies of a sentence in one forward pass, each with another token masked."""


def fill_masks(folder: Path, sentences: Sequence[str], top: int) -> list[list[tuple[str, float]]]:
    """For each sentence with one mask token, the ``top`` most likely tokens and their probabilities."""
    tokenizer = load_hf_tokenizer(folder)
    model = load_pretrained(lazy_transformers.AutoModelForMaskedLM, folder)
    fill = lazy_transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    return [
        [(_as_text(tokenizer, int(answer["token"])), float(answer["score"])) for answer in fill(sentence, top_k=top)]
        for sentence in sentences
    ]


def common_words(folder: Path, counts: Int64[np.ndarray, " V"], top: int) -> list[str]:
    """The ``top`` most frequent tokens: what a guess by frequency predicts everywhere."""
    tokenizer = load_hf_tokenizer(folder)
    return [_as_text(tokenizer, int(token)) for token in np.argsort(-counts, kind="stable")[:top]]


def _as_text(tokenizer: lazy_transformers.PreTrainedTokenizerBase, token_id: int) -> str:
    """The text of a token; in quotes, as the vocabulary spells it, if it is blank or not a whole character."""
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    text = tokenizer.convert_tokens_to_string([token]).strip()
    return text if text and text.isprintable() and "\ufffd" not in text else repr(token)


@torch.no_grad()
def sentence_entropies(
    folder: Path, tokens: Int64[Tensor, " n"], mask_id: int, signal: Literal["clean", "masked"]
) -> Float[Tensor, " n"]:
    """Shannon entropy, in nats, of what the model in ``folder`` predicts at each of ``tokens``, special ones included.

    clean: the sentence as it is, in one pass. masked: each token in turn replaced by [MASK], a pass for each token. A
    model that was trained with [MASK] at all targets never had to predict a token that it sees, so its clean
    entropies say little. Raises DataError if the vocabulary or the positions of the model do not suffice,
    CheckpointError if it is not a complete masked language model.
    """
    model = load_pretrained(lazy_transformers.AutoModelForMaskedLM, folder)
    size, longest = model.config.vocab_size, max_length(model)
    if int(tokens.max()) >= size:
        raise DataError(f"{folder} has {size} tokens, but the sentence has the id {int(tokens.max())}: "
                        "model and tokenizer do not belong together.")  # fmt: skip
    if longest is not None and len(tokens) > longest:
        raise DataError(f"The sentence has {len(tokens)} tokens, but {folder} takes at most {longest}.")
    if signal == "clean":
        return _entropy(model(input_ids=tokens[None]).logits[0])
    positions = torch.arange(len(tokens))
    masked = tokens.repeat(len(tokens), 1)
    masked[positions, positions] = mask_id
    entropies = []
    with ProgressBar("entropies", len(tokens), "token") as bar:
        for inputs, at in zip(masked.split(COPIES), positions.split(COPIES), strict=True):
            entropies.append(_entropy(_logits_at(model, inputs, at)))
            bar.update(len(inputs))
    return torch.cat(entropies)


def _logits_at(
    model: lazy_transformers.PreTrainedModel, tokens: Int64[Tensor, "n T"], positions: Int64[Tensor, " n"]
) -> Float[Tensor, "n V"]:
    """The logits of each row of ``tokens`` at its position, with the output matrix applied only there.

    At all positions it costs more than the rest of a small model. A model without such a matrix computes them all.
    """
    rows = torch.arange(len(tokens))

    def select(module: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (states[0][rows, positions][:, None],) if states[0].shape[:2] == tokens.shape else None

    decoder = model.get_output_embeddings()
    hook = decoder.register_forward_pre_hook(select) if isinstance(decoder, nn.Linear) else None
    try:
        logits = model(input_ids=tokens).logits
    finally:
        if hook:
            hook.remove()
    return logits[:, 0] if logits.shape[1] == 1 else logits[rows, positions]


def _entropy(logits: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).float()
