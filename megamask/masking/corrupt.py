"""What stands in the place of a chosen token: [MASK], a random token, or itself. Exact counts of each."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor, tensor

from megamask.batch import MaskPlan, PackedBatch, TokenIds
from megamask.errors import must
from megamask.masking.rng import PackRng


@dataclass(frozen=True)
class Corruption:
    """Shares of the targets; they add up to 1. BERT (Devlin et al. 2019) has 0.8, 0.1, 0.1."""

    mask: float = 0.8
    """Share of the targets replaced by [MASK]."""
    random: float = 0.1
    """Share of the targets replaced by a random token that is not special."""
    keep: float = 0.1
    """Share of the targets left as they are, but asked for."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong."""
        found = [
            must(f"{name}.{part}", "lie in [0, 1]", share) for part, share in vars(self).items() if not 0 <= share <= 1
        ]
        total = self.mask + self.random + self.keep
        if abs(total - 1) > 1e-9:
            found.append(must(f"{name}.mask + {name}.random + {name}.keep", "be 1", round(total, 9)))
        return found

    def counts(self, targets: int) -> tuple[int, int]:
        """How many of ``targets`` become [MASK] and how many a random token; the rest stay."""
        masks = round(self.mask * targets)
        return masks, min(round(self.random * targets), targets - masks)


def corrupt(
    batch: PackedBatch,
    targets: Int64[Tensor, " M"],
    mix: Corruption,
    ids: TokenIds,
    rng: PackRng,
    probability: Float[Tensor, " M"] | None = None,
) -> MaskPlan:
    """The plan for the ascending ``targets``; ``probability``, the chance each had of being one, is passed on.

    Differs from BERT: counts are exact and not drawn token by token, so that shapes are the same in every pack.
    """
    device = targets.device
    masks, randoms = mix.counts(len(targets))
    shuffled = targets[rng.order(len(targets), device)]
    hidden = shuffled[:masks].sort().values
    inputs = batch.tokens.clone()
    inputs[hidden] = ids.mask
    inputs[shuffled[masks : masks + randoms]] = _ordinary(
        ids, rng.integers(ids.size - len(ids.special), randoms, device)
    )
    visible = batch.maskable.new_ones(batch.layout.rows).index_fill_(0, hidden, False).nonzero().squeeze(1)
    return MaskPlan(inputs, targets, batch.tokens[targets], hidden, visible, probability)


def _ordinary(ids: TokenIds, index: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """The ``index``-th id that is not special, without a table of the vocabulary."""
    for special in sorted(ids.special):
        index = index + (index >= tensor(special, device=index.device))
    return index
