"""How unsure a model of transformers is of each token of a sentence: two questions that have two answers.

Costs one pass over the sentence for the clean signal, one for each token for the masked one: for the eye, not for
training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.errors import DataError
from megamask.hf import lazy_transformers
from megamask.hf.masked_lm import check_whole
from megamask.runtime.progress_bar import ProgressBar

AT_ONCE = 32
"""Copies of the sentence in one pass."""


@torch.no_grad()
def sentence_entropies(
    folder: Path, tokens: Int64[Tensor, " n"], mask_id: int, signal: Literal["clean", "masked"]
) -> Float[Tensor, " n"]:
    """Shannon entropy, in nats, of what the model in ``folder`` predicts at each of ``tokens``, special ones included.

    clean: the sentence as it stands. masked: each token in turn replaced by [MASK], alone. A model that was trained
    with [MASK] at all targets has never been asked for a token that it sees, so its clean entropies say little.
    Raises DataError if the model's vocabulary or length does not reach, CheckpointError if it has no head.
    """
    model, report = lazy_transformers.load_model(lazy_transformers.AutoModelForMaskedLM, folder)
    check_whole(report, folder)
    model.eval()
    size, longest = model.config.vocab_size, model.config.max_position_embeddings
    if int(tokens.max()) >= size:
        raise DataError(f"{folder} has {size} tokens, but the sentence holds the id {int(tokens.max())}: "
                        "model and tokenizer do not belong together.")  # fmt: skip
    if len(tokens) > longest:
        raise DataError(f"The sentence has {len(tokens)} tokens, but {folder} takes at most {longest}.")
    if signal == "clean":
        return _entropy(model(input_ids=tokens[None]).logits[0])
    each = torch.arange(len(tokens))
    masked = tokens.repeat(len(tokens), 1)
    masked[each, each] = mask_id
    found = []
    with ProgressBar("entropies", len(tokens), "token") as bar:
        for some, places in zip(masked.split(AT_ONCE), each.split(AT_ONCE), strict=True):
            found.append(_entropy(_logits_at(model, some, places)))
            bar.update(len(some))
    return torch.cat(found)


def _logits_at(
    model: lazy_transformers.PreTrainedModel, tokens: Int64[Tensor, "n T"], places: Int64[Tensor, " n"]
) -> Float[Tensor, "n V"]:
    """The logits of each row of ``tokens`` at its place, from an output matrix that is computed there alone.

    At all places it costs more than the rest of a small model. A model without such a matrix computes all of them.
    """
    rows = torch.arange(len(tokens))

    def select(module: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (states[0][rows, places][:, None],) if states[0].shape[:2] == tokens.shape else None

    decoder = model.get_output_embeddings()
    hook = decoder.register_forward_pre_hook(select) if isinstance(decoder, nn.Linear) else None
    try:
        logits = model(input_ids=tokens).logits
    finally:
        if hook:
            hook.remove()
    return logits[:, 0] if logits.shape[1] == 1 else logits[rows, places]


def _entropy(logits: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    p = logits.double().log_softmax(-1)
    return -(p.exp() * p).sum(-1).float()
