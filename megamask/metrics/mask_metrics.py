"""Statistics of the targets of a run: their frequencies and tags, and the weights of the importance correction.

Shares of the targets by decile of frequency: types are ordered from the most frequent to the rarest, and each decile
has a tenth of the occurrences in the training text. A type on a boundary counts to both deciles in proportion, so under
random masks every share is 0.1 on average. A share of 0.3 in the last decile means that the rarest types are masked
three times as often as under random masks.

Costs a look-up of 10 numbers per target and a few small kernels a pack; only ``take`` waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import Losses, MaskPlan, PackedBatch
from megamask.runtime import ranks

DECILES = 10


def frequency_deciles(counts: Int64[Tensor, " V"]) -> Float[Tensor, "V 10"]:
    """The share of each type's occurrences in each decile; rows add up to 1, to 0 for types that do not occur.

    ``counts`` are the occurrences of each type in the text; types that cannot be masked should have 0.
    """
    order = counts.argsort(descending=True, stable=True)
    # in whole numbers, tenths of an occurrence: differences of shares near 1 would lose the rarest types
    after = counts[order].cumsum(0) * DECILES
    before = after - counts[order] * DECILES
    edges = torch.arange(DECILES + 1) * counts.sum()
    inside = (after[:, None].minimum(edges[1:]) - before[:, None].maximum(edges[:-1])).clamp(min=0)
    shares = inside.double() / (after - before).clamp(min=1)[:, None]
    return torch.empty_like(shares).index_copy_(0, order, shares)


class MaskMetrics:
    """Running sums over the targets of a rank."""

    def __init__(
        self,
        counts: Int64[Tensor, " V"],
        *,
        tags: Sequence[str] = (),
        max_weight: float | None = None,
        sources: Sequence[str] = (),
        source_of: Callable[[int], int] | None = None,
    ):
        """``counts`` as in `frequency_deciles`; ``tags`` are the names of the text's tags from 1, if it has any;
        ``max_weight`` is that at which the weights of the plans are clipped. Of a mixture, ``sources`` are the names,
        and ``source_of`` gives the place of the source of a pack's number among them.
        """
        self._sources, self._source_of = tuple(sources), source_of
        self._deciles = frequency_deciles(counts).to(ranks.device())
        self._tags, self._max_weight = tuple(tags), max_weight
        self._reset()

    def _reset(self) -> None:
        device = self._deciles.device
        self._by_decile = torch.zeros(DECILES, dtype=torch.float64, device=device)
        self._by_tag = torch.zeros(len(self._tags) + 1, dtype=torch.float64, device=device)
        self._entropy = torch.zeros(2, dtype=torch.float64, device=device)
        # of weighted targets: their number, weights, squares, weighted nll, and the number of clipped ones
        self._weights = torch.zeros(5, dtype=torch.float64, device=device)
        # of each source: targets, and tokens that can be masked
        self._by_source = torch.zeros(len(self._sources), 2, dtype=torch.float64, device=device)
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._targets = 0

    def add(
        self, batch: PackedBatch, plan: MaskPlan, losses: Losses, entropy: Float[Tensor, " T"] | None = None
    ) -> None:
        """Count the targets of a pack, with the ``entropy`` that guided its masks, if any."""
        self._targets += len(plan.targets)
        self._by_decile += self._deciles[plan.labels].sum(0)
        if self._source_of is not None:
            source = self._by_source[self._source_of(batch.number)]
            source[0] += len(plan.targets)
            source[1] += batch.maskable.sum()
        if self._tags and batch.tags is not None:
            tags = batch.tags[plan.targets].long()
            self._by_tag.index_add_(0, tags, torch.ones_like(tags, dtype=torch.float64))
        if entropy is not None:
            at_targets = entropy[plan.targets].double()
            self._entropy += torch.stack([at_targets.sum(), torch.ones_like(at_targets).sum()])
        if plan.weights is not None:
            weights = plan.weights.double()
            clipped = torch.zeros_like(weights) if self._max_weight is None else plan.weights >= self._max_weight
            terms = [torch.ones_like(weights), weights, weights.square(), weights * losses.nll, clipped]
            self._weights += torch.stack([term.sum() for term in terms])
            self._largest = self._largest.maximum(weights.max())

    def take(self) -> dict[str, float]:
        """The metrics since the last call, over all ranks, by name; none of what was not seen. Collective.

        `masks/decile_1` (the most frequent types) to `masks/decile_10` and `masks/tags/NAME`: shares of the targets.
        `masks/rate/NAME`: of each source of a mixture, the targets as a share of the tokens that can be masked.
        `entropy/targets`: the mean entropy at the targets; `entropy/mean` is that at all maskable tokens.
        With a correction: `train/weighted_loss` in nats, and of the weights `correction/mean`, `correction/largest`,
        `correction/clipped` (share of the targets) and `correction/effective_sample`, (sum of weights)^2 / sum of
        squares as a share of the targets (Kish 1965).
        """
        largest = torch.zeros(ranks.world(), dtype=torch.float64, device=self._largest.device)
        largest[ranks.rank()] = self._largest
        targets = self._largest.new_tensor([self._targets])
        parts = [
            self._by_decile,
            self._by_tag,
            self._entropy,
            self._weights,
            self._by_source.flatten(),
            targets,
            largest,
        ]
        sums = ranks.sum(torch.cat(parts)).split([len(part) for part in parts])
        self._reset()
        deciles, tags, (entropy, scored), weights, rates, (total,), maxima = (part.tolist() for part in sums)
        if not total:
            return {}
        metrics = {f"masks/decile_{n}": share / total for n, share in enumerate(deciles, 1)}
        metrics |= {f"masks/tags/{name}": count / total for name, count in zip(self._tags, tags[1:], strict=True)}
        for name, chosen, maskable in zip(self._sources, rates[::2], rates[1::2], strict=True):
            if maskable:
                metrics[f"masks/rate/{name}"] = chosen / maskable
        if scored:
            metrics["entropy/targets"] = entropy / scored
        return metrics | _weight_metrics(*weights, largest=max(maxima))


def _weight_metrics(
    targets: float, weight: float, square: float, loss: float, clipped: float, *, largest: float
) -> dict[str, float]:
    """The metrics of weighted targets, from sums over them; none if there were none."""
    if not targets:
        return {}
    return {
        "train/weighted_loss": loss / targets,
        "correction/mean": weight / targets,
        "correction/largest": largest,
        "correction/clipped": clipped / targets,
        "correction/effective_sample": weight**2 / (square * targets),
    }
