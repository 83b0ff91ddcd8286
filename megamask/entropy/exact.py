"""The exact entropy: a pass of a model without gradients over the text that is about to be masked.

`clean` costs one forward pass with the head at every row: about 0.4 of a plain training step from base size up.
`masked` costs ``passes`` of them, with the head at every row once. Two things make it cheaper: several masked views of
one text share a pass (``PackedBatch.text``), and a proposer may name the candidates to which the head is confined,
which pays where the head is dearer than the encoder, as in tiny models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.batch import Learner, Losses, MaskPlan, PackedBatch
from megamask.entropy.source import EntropyFn, EntropySource, Signal, source_packs
from megamask.masking.piece_order import PieceOrder, PieceTable
from megamask.masking.rng import PackRng

PURPOSE = "exact"
"""The stream of random numbers from which groups are drawn, apart from that of the masks."""


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
    maskable = batch.maskable.nonzero().squeeze(1) if rows is None else rows
    return [_hide(batch, group, mask_id) for group in groups(batch, maskable, passes, rng)]


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
    """The ascending ``rows`` dealt at random into ``passes`` groups, as evenly as that goes in every sequence."""
    shuffled = rows[rng.order(len(rows), rows.device)]
    # sequence by sequence, in random order inside each, and then as cards are dealt
    dealt = shuffled[torch.argsort(batch.layout.sequence[shuffled], stable=True)]
    return [dealt[first::passes].sort().values for first in range(passes)]


def _predict_at(batch: PackedBatch, rows: Int64[Tensor, " C"]) -> MaskPlan:
    plan = MaskPlan.hide_nothing(batch)
    return MaskPlan(batch.tokens, rows, batch.tokens[rows], plan.hidden, plan.visible)


def _hide(batch: PackedBatch, rows: Int64[Tensor, " C"], mask_id: int) -> MaskPlan:
    inputs = batch.tokens.index_fill(0, rows, mask_id)
    visible = torch.ones_like(batch.maskable).index_fill_(0, rows, False).nonzero().squeeze(1)
    return MaskPlan(inputs, rows, batch.tokens[rows], rows, visible)


class Exact(EntropySource):
    """The model's own entropies, or a teacher's, by asking; each text is asked about once per call.

    With a proposer, only the best ``candidates`` x budget rows of a pack by its score are asked about, each sequence
    its fair share, and all others get the lowest value found in the pack. That is right for a strategy that takes the
    highest entropies. Any other (low, middle, both) would take rows nobody asked about: the caller must refuse it.
    Under `masked` only candidates are ever hidden, so more of the text is in sight than without a proposer.
    What the proposer learns it learns from here: ``update``, ``sync`` and its state are passed on.
    """

    def __init__(
        self,
        ask: EntropyFn,
        *,
        signal: Signal,
        passes: int,
        mask_id: int,
        seed: int,
        propose: EntropySource | None = None,
        candidates: Callable[[], int] | None = None,
    ):
        """``candidates`` says how many rows of a pack are asked about now; present if and only if ``propose`` is."""
        assert (propose is None) == (candidates is None)
        self.ask, self.signal, self.passes, self.mask_id, self.seed = ask, signal, passes, mask_id, seed
        self.propose, self.candidates = propose, candidates

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " T"]]:
        """Entropies of each batch; batches of one text share theirs."""
        texts = {source_packs(batch): batch for batch in batches}
        proposals = dict(zip(texts, self.propose(list(texts.values())), strict=True)) if self.propose else {}
        found = {text: self._measure(batch, proposals.get(text)) for text, batch in texts.items()}
        return [found[source_packs(batch)] for batch in batches]

    def _measure(self, batch: PackedBatch, proposal: Float[Tensor, " T"] | None) -> Float[Tensor, " T"]:
        rng = PackRng(self.seed, source_packs(batch), PURPOSE)
        if proposal is None:
            return measure_entropy(self.ask, batch, self.signal, self.passes, self.mask_id, rng)
        assert self.candidates is not None
        tokens = PieceTable.of_tokens(batch)
        count = (self.candidates() / tokens.count.sum() * tokens.count).ceil()
        rows = PieceOrder.of(proposal, tokens).top(count).nonzero().squeeze(1)
        found = measure_entropy(self.ask, batch, self.signal, self.passes, self.mask_id, rng, rows)
        return found[rows].min().expand_as(found).index_copy(0, rows, found[rows])

    def update(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """The proposer learns; nothing else does."""
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
    """A moving average of a module's parameters, in fp32, as a module of its own that asks nobody for gradients.

    The weight of the past is min(``decay``, (1 + n) / (10 + n)) in update n, so that the first, random weights are
    soon forgotten (as TensorFlow's ExponentialMovingAverage does with `num_updates`). Costs the fp32 weights in
    memory and one pass over them a step. Buffers stay as they were when it was made.
    """

    def __init__(self, module: nn.Module, decay: float, weights: Callable[[], Mapping[str, Tensor]]):
        """``module`` is copied and left alone; parameters must be whole, not in ZeRO-3's parts.

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
        """Go on from there."""
        self._updates = int(state["updates"])
        for name, own in self._own.items():
            own.copy_(state[f"weights/{name}"])
