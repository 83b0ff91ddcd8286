"""The order of the sources of a mixture in a run, from its settings and the sizes of the sources."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from megamask.config.phases import run_phases
from megamask.config.pretrain_config import PretrainConfig
from megamask.data.mixture import AnnealedOrder, SourceOrder, block_quotas, smoothed_shares


def source_order(config: PretrainConfig, sizes: Sequence[int]) -> SourceOrder | AnnealedOrder:
    """The order of sources of ``sizes`` packs in a run with ``config``, by text number."""
    mixture, phases = config.mixture, run_phases(config)
    if mixture.alpha_end is not None:
        return AnnealedOrder.by_alpha(sizes, mixture.alpha, mixture.alpha_end, _texts(config))
    plain = _order_of(sizes, mixture.shares, mixture.alpha)
    orders = [
        plain if phase.shares is None and phase.alpha is None else _order_of(sizes, phase.shares, phase.alpha)
        for phase in phases.phases
    ]
    return AnnealedOrder(orders, phases.first_texts) if any(order is not plain for order in orders) else plain


def mean_shares(config: PretrainConfig, order: SourceOrder | AnnealedOrder) -> Float[np.ndarray, " S"]:
    """The share of each source in the packs of the whole run; of shares that do not move, rounded to a pack in a
    block."""
    total = _texts(config)
    return order.counts(total) / total if isinstance(order, AnnealedOrder) else order.shares_at(0)


def _texts(config: PretrainConfig) -> int:
    """The texts of a run."""
    phases = run_phases(config)
    return phases.text_of(phases.packs_before(config.steps))


def _order_of(sizes: Sequence[int], shares: Sequence[float] | None, alpha: float | None) -> SourceOrder:
    return SourceOrder(block_quotas(shares or smoothed_shares(sizes, 1.0 if alpha is None else alpha).tolist()))
