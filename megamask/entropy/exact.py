"""The exact entropy: forward passes of a model over the text that is about to be masked, without gradients.

`clean` costs one forward pass with the head at every token: about 0.4 of a plain training step from base size up.
`masked` costs ``passes`` forward passes, with the head at every token once. Two things make it cheaper: packs with the
same text share a pass (``PackedBatch.source_pack``), and a proposer may limit the head to candidates. That pays off
where the head costs more than the encoder, as in tiny models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.batch import Learner, Losses, MaskPlan, PackedBatch
from megamask.entropy.source import EntropyFn, EntropySource, Signal, source_packs
from megamask.masking.piece_order import PieceOrder, PieceTable
from megamask.masking.rng import PackRng, send

PURPOSE = "exact"
"""Purpose of the random numbers for the groups, a stream apart from that of the masks."""


def entropy_plans(
    batch: PackedBatch,
    signal: Signal,
    passes: int,
    mask_id: int,
    rng: PackRng,
    rows: Int64[Tensor, " C"] | None = None,
) -> list[MaskPlan]:
    """The plans under which a model must predict to give its entropy at every token, or at the sorted ``rows`` alone.

    `clean`: one plan for all tokens, with nothing hidden. `masked`: the maskable tokens are divided at random into
    ``passes`` groups; each group is hidden under [MASK] once and predicted, while the rest of the text is visible.
    Every sequence is divided evenly, so about 1/``passes`` of each is hidden at a time. The number of plans is always
    the same, even if a group is empty, because under ZeRO-3 all ranks must run the same number of passes.
    """
    if signal == "clean":
        return [MaskPlan.hide_nothing(batch) if rows is None else _predict_at(batch, rows)]
    if rows is None:
        rows = torch.nonzero_static(batch.maskable, size=batch.on_host.maskable_tokens).squeeze(1)
    return [_hide(batch, group, mask_id) for group in groups(batch, rows, passes, rng)]


@torch.no_grad()
def measure_entropy(
    entropy_fn: EntropyFn,
    batch: PackedBatch,
    signal: Signal,
    passes: int,
    mask_id: int,
    rng: PackRng,
    rows: Int64[Tensor, " C"] | None = None,
) -> Float[Tensor, " T"]:
    """The entropy at every token of ``batch``, or at the sorted ``rows`` alone, in nats, fp32; 0 elsewhere.

    See `entropy_plans` for the arguments.
    """
    entropy = torch.zeros(batch.layout.rows, device=batch.tokens.device)
    for plan in entropy_plans(batch, signal, passes, mask_id, rng, rows):
        entropy[plan.targets] = entropy_fn(batch, plan).float()
    return entropy


def groups(batch: PackedBatch, rows: Int64[Tensor, " C"], passes: int, rng: PackRng) -> list[Int64[Tensor, " g"]]:
    """The sorted ``rows`` divided at random into ``passes`` groups, as evenly as possible in every sequence."""
    shuffled = rows[rng.order(len(rows), rows.device)]
    # sequence by sequence, in random order inside each; every ``passes``-th goes to the same group
    dealt = shuffled[torch.argsort(batch.layout.sequence[shuffled], stable=True)]
    return [dealt[first::passes].sort().values for first in range(passes)]


def _predict_at(batch: PackedBatch, rows: Int64[Tensor, " C"]) -> MaskPlan:
    plan = MaskPlan.hide_nothing(batch)
    return MaskPlan(batch.tokens, rows, batch.tokens[rows], plan.hidden, plan.visible)


def _hide(batch: PackedBatch, rows: Int64[Tensor, " C"], mask_id: int) -> MaskPlan:
    inputs = batch.tokens.index_fill(0, rows, mask_id)
    is_visible = torch.ones_like(batch.maskable).index_fill_(0, rows, False)
    visible = torch.nonzero_static(is_visible, size=len(is_visible) - len(rows)).squeeze(1)
    return MaskPlan(inputs, rows, batch.tokens[rows], rows, visible)


class Exact(EntropySource):
    """The entropies of the model itself, or of its moving average; each text is measured once per call.

    With a proposer, only the ``candidates`` tokens of a pack with its highest values are measured, each sequence in
    proportion to its maskable tokens; all others get the lowest entropy measured in the pack. That is right for
    strategies that take the highest entropies. Any other (low, middle, both) would take tokens that were not measured:
    the caller must refuse it. Under `masked` only candidates are hidden, so more of the text is visible than without a
    proposer. The state is that of the proposer.
    """

    def __init__(
        self,
        entropy_fn: EntropyFn,
        *,
        signal: Signal,
        passes: int,
        mask_id: int,
        seed: int,
        propose: EntropySource | None = None,
        candidates: int | None = None,
    ):
        """``candidates`` is the number of tokens of a pack that are measured; given if and only if ``propose`` is."""
        assert (propose is None) == (candidates is None)
        self.entropy_fn, self.signal, self.passes, self.mask_id, self.seed = entropy_fn, signal, passes, mask_id, seed
        self.propose, self.candidates = propose, candidates

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " T"]]:
        """The entropies of each batch; batches with the same text share theirs."""
        texts = {source_packs(batch): batch for batch in batches}
        proposals = dict(zip(texts, self.propose(list(texts.values())), strict=True)) if self.propose else {}
        entropies = {text: self._measure(batch, proposals.get(text)) for text, batch in texts.items()}
        return [entropies[source_packs(batch)] for batch in batches]

    def _measure(self, batch: PackedBatch, proposal: Float[Tensor, " T"] | None) -> Float[Tensor, " T"]:
        rng = PackRng(self.seed, source_packs(batch), PURPOSE)
        if proposal is None:
            return measure_entropy(self.entropy_fn, batch, self.signal, self.passes, self.mask_id, rng)
        assert self.candidates is not None
        # the host knows how many tokens each sequence can have, so it knows how many are candidates
        maskable = batch.on_host.maskable_by_sequence
        share = np.float32(self.candidates) / np.float32(maskable.sum())
        most = np.minimum(np.ceil(share * maskable.astype(np.float32)).astype(np.int64), maskable)
        (count,) = send([torch.from_numpy(most)], batch.tokens.device)
        best = PieceOrder.of(proposal, PieceTable.of_tokens(batch)).top(count)
        rows = torch.nonzero_static(best, size=int(most.sum())).squeeze(1)
        entropy = measure_entropy(self.entropy_fn, batch, self.signal, self.passes, self.mask_id, rng, rows)
        return entropy[rows].min().expand_as(entropy).index_copy(0, rows, entropy[rows])

    def update(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """Update the proposer."""
        if self.propose:
            self.propose.update(batch, plan, losses)

    def sync(self) -> None:
        """The proposer's."""
        if self.propose:
            self.propose.sync()

    def state_dict(self) -> dict[str, Tensor]:
        """The proposer's."""
        return self.propose.state_dict() if self.propose else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The proposer's."""
        if self.propose:
            self.propose.load_state_dict(state)


class Average(Learner):
    """A moving average of a module's parameters in fp32, as a separate module without gradients.

    The weight of the past is min(``decay``, (1 + n) / (10 + n)) in update n, so that the random initial weights are
    soon forgotten (as TensorFlow's ExponentialMovingAverage does with `num_updates`). Costs the fp32 weights in
    memory and one pass over them a step. Buffers stay as they were when it was made.
    """

    def __init__(self, module: nn.Module, decay: float, weights: Callable[[], Mapping[str, Tensor]]):
        """``module`` is copied and not changed; its parameters must be whole, not partitioned by ZeRO-3.

        ``weights`` returns the current weights by the names that the module has for them.
        """
        self.decay, self._weights = decay, weights
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)
        self._own = dict(self.module.named_parameters())
        self._updates = 0

    @torch.no_grad()
    def sync(self) -> None:
        """Take in the weights after a step."""
        parameters = self._weights()
        assert parameters.keys() == self._own.keys(), sorted(parameters.keys() ^ self._own.keys())[:5]
        self._updates += 1
        past = min(self.decay, (1 + self._updates) / (10 + self._updates))
        for name, own in self._own.items():
            own.lerp_(parameters[name].to(own), 1 - past)

    def state_dict(self) -> dict[str, Tensor]:
        """The average itself and the number of updates."""
        return {"updates": torch.tensor([self._updates])} | {f"weights/{n}": p.clone() for n, p in self._own.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state."""
        self._updates = int(state["updates"])
        for name, own in self._own.items():
            own.copy_(state[f"weights/{name}"])
