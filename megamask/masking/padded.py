"""Padded batches of your own training loop: a batch to a pack, a plan to padded tensors, and logits to losses.

For a batch of ``B`` sequences padded to ``L`` tokens on either side, as the collators of transformers make it. All
``B`` x ``L`` tokens become one pack, so the indices of a plan are those of logits flattened to (B * L, V). Costs next
to nothing beside a model, but waits for the device if the batch is there already: to find where sequences begin, and
for what decides sizes. Pack it on the host and move the pack, and nothing waits. `losses_at` reads only the logits of
the targets.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from megamask.batch import Layout, Losses, MaskPlan, PackedBatch, TokenIds
from megamask.errors import DataError, raise_all

IGNORED = -100
"""The label of tokens that are not targets, which torch's cross-entropy ignores."""


def pack_padded(
    input_ids: Int64[Tensor, "*shape"],
    attention_mask: Shaped[Tensor, "*alike"],
    ids: TokenIds,
    number: int,
    starts_word: Bool[Tensor, "*too"] | None = None,
) -> PackedBatch:
    """The pack of a padded batch, whose tensors have the shape (B, L).

    Each run of tokens is a sequence, and so is each run of padding, in which nothing can be masked.

    ``number`` is that of the batch in the run: with the seed it decides the mask, so it must differ from batch to
    batch. ``starts_word`` says which tokens begin a word; without it each is a word of its own, so the units `word`
    and `span` count tokens. For a table by id, give ``table[input_ids]``.

    A masker takes its ratio of all rows, padding included; give it ``rows=int(attention_mask.sum())`` for a ratio
    of the real tokens, as loops with padded batches usually mean it. Raises DataError for shapes that do not fit.
    """
    shape = tuple(input_ids.shape)
    beside = {"attention_mask": attention_mask} | ({} if starts_word is None else {"starts_word": starts_word})
    wrong = [] if len(shape) == 2 and all(shape) else [f"`input_ids` must have the shape (B, L), but has {shape}."]
    wrong += [
        f"`{name}` must have the shape of `input_ids`, {shape}, but has {tuple(tensor.shape)}."
        for name, tensor in beside.items()
        if tensor.shape != input_ids.shape
    ]
    raise_all(DataError, wrong)
    real = attention_mask.bool()
    begins = torch.ones_like(real)
    begins[:, 1:] = real[:, 1:] != real[:, :-1]
    starts = begins.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.cat([starts, starts.new_full((1,), real.numel())])
    special = torch.tensor(ids.special, device=real.device)
    return PackedBatch(
        number,
        input_ids.flatten(),
        Layout.of(cu_seqlens, real.numel(), shape[1]),
        (torch.ones_like(real) if starts_word is None else starts_word).flatten(),
        (real & ~torch.isin(input_ids, special)).flatten(),
    )


def pad_plan(plan: MaskPlan, shape: tuple[int, int]) -> tuple[Int64[Tensor, "B L"], Int64[Tensor, "B L"]]:
    """``input_ids`` and ``labels`` for a model of transformers, in the ``shape`` (B, L) of the batch.

    Labels are -100 at all rows but the targets, so such a model's own loss is the mean over the targets, without
    ``plan.weights``: with a correction, take that of `losses_at`.
    """
    labels = torch.full_like(plan.inputs, IGNORED).index_copy_(0, plan.targets, plan.labels)
    return plan.inputs.view(shape), labels.view(shape)


def losses_at(logits: Float[Tensor, "B L V"], plan: MaskPlan) -> Losses:
    """Cross-entropy, Shannon entropy and accuracy of a model's ``logits`` at the targets, in fp32.

    ``total`` over the number of targets is the loss that such a model returns for the labels, unless ``plan.weights``
    weight it.
    """
    log_p = logits.flatten(0, 1)[plan.targets].float().log_softmax(-1)
    nll = -log_p.gather(1, plan.labels[:, None]).squeeze(1)
    entropy = torch.special.entr(log_p.detach().exp()).sum(-1)
    total = nll.sum() if plan.weights is None else (plan.weights * nll).sum()
    return Losses(total, nll.detach(), entropy, log_p.detach().argmax(-1) == plan.labels)
