"""How well a source predicts the exact entropy: three metrics, and an audit of the source in use.

The metrics compare maskable tokens within their sequence, because masks are chosen that way. `overlap`: the share of
the exact choice that is also in the source's choice. `captured_gain`: the entropy above the mean of the source's
choice, as a share of that of the exact choice. `spearman`: the rank correlation.

For the `masked` signal no source can be perfect: which tokens are hidden together is random, and another draw gives
other entropies. The ceiling is the gain that a second draw captures (0.85 to 0.9 in two small models).

An audit of one micro-batch costs one forward pass (`clean`) or twice ``passes`` (`masked`); the metrics take a few
milliseconds on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megamask.batch import Learner, PackedBatch
from megamask.entropy.exact import measure_entropy
from megamask.entropy.frequency import Frequency
from megamask.entropy.source import AuditConfig, EntropyFn, Signal, source_packs
from megamask.masking.piece_order import PieceOrder, PieceTable
from megamask.masking.rng import PackRng
from megamask.runtime import ranks

# ---- metrics; NaN for a sequence, or in all, where there is nothing to compare


def overlap(
    predicted: Float[Tensor, " T"], exact: Float[Tensor, " T"], share: float, batch: PackedBatch
) -> Float[Tensor, " S"]:
    """How many of each sequence's ``share`` of tokens with the highest ``exact`` have the highest ``predicted`` too."""
    tokens = PieceTable.of_tokens(batch)
    best = _top(tokens, exact, share)
    shared = best & _top(tokens, predicted, share)
    return tokens.sum(shared.double()) / _unless_zero(tokens.sum(best.double()))


def captured_gain(
    predicted: Float[Tensor, " T"], exact: Float[Tensor, " T"], share: float, batch: PackedBatch
) -> Float[Tensor, ""]:
    """The entropy above the mean that the tokens with the highest ``predicted`` have, over that of the best choice.

    Both are sums over all sequences: a ratio per sequence would give too much weight to short and flat ones.
    """
    captured, possible = _gains(predicted, exact, share, batch)
    return captured / _unless_zero(possible)


def spearman(predicted: Float[Tensor, " T"], exact: Float[Tensor, " T"], batch: PackedBatch) -> Float[Tensor, " S"]:
    """The rank correlation in each sequence; equal values have the mean of their ranks."""
    tokens = PieceTable.of_tokens(batch)
    ranks_of = [
        PieceOrder.of(values.masked_fill(~batch.maskable, -torch.inf), tokens).mean_ranks
        for values in (predicted, exact)
    ]
    a, b = (ranks - tokens.mean_of_sequence(ranks) for ranks in ranks_of)
    return tokens.sum(a * b) / _unless_zero((tokens.sum(a * a) * tokens.sum(b * b)).sqrt())


def _top(tokens: PieceTable, values: Float[Tensor, " T"], share: float) -> Bool[Tensor, " T"]:
    """The ``share`` of each sequence's maskable tokens with the highest values."""
    return PieceOrder.of(values, tokens).top((share * tokens.count.double()).round())


def _gains(predicted: Tensor, exact: Tensor, share: float, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    tokens = PieceTable.of_tokens(batch)
    above = exact.double() - tokens.mean_of_sequence(exact.double())
    captured, possible = ((above * _top(tokens, values, share))[batch.maskable].sum() for values in (predicted, exact))
    return captured, possible


def _unless_zero(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, torch.nan)


# ---- the audit


@dataclass(frozen=True)
class AuditResult:
    """Metrics by their name in the log, and the source that takes over from now on, if any."""

    metrics: dict[str, float]
    fall_back: str | None = None
    sentence: str | None = None
    """A message for the user if the audit failed."""


class Audit(Learner):
    """Compares the source in use with the exact signal, counts failures in a row, and names the next source.

    State: which source is in use, and its failures in a row.
    """

    def __init__(
        self,
        config: AuditConfig,
        source: str,
        entropy_fn: EntropyFn,
        frequency: Frequency,
        *,
        signal: Signal,
        passes: int,
        mask_id: int,
        seed: int,
    ):
        """The run starts with ``source``; ``config.fall_back`` are the next ones."""
        self.config, self.entropy_fn, self.frequency = config, entropy_fn, frequency
        self.signal, self.passes, self.mask_id, self.seed = signal, passes, mask_id, seed
        self._sources: Sequence[str] = (source, *config.fall_back)
        self._place = self._failures = 0

    @property
    def source(self) -> str:
        """The source in use."""
        return self._sources[self._place]

    def due(self, step: int) -> bool:
        """Whether ``step`` has an audit; the first is after ``every`` steps."""
        return self.config.every is not None and step > 0 and step % self.config.every == 0

    def __call__(
        self,
        batch: PackedBatch,
        entropy: Float[Tensor, " T"],
        share: float,
    ) -> AuditResult:
        """Audit the ``entropy`` that the source gave for ``batch``, as a choice of ``share`` of its maskable tokens.

        Collective. Only rank 0's batch counts, for any number of ranks; the others run the passes too, because ZeRO 3
        needs all ranks.
        """
        exact = self._exact(batch, "audit")
        # nothing is random for clean text
        ceiling = exact if self.signal == "clean" else self._exact(batch, "again")
        host = batch.to("cpu")
        others = {"": entropy, "frequency_": self.frequency([batch])[0], "ceiling_": ceiling}
        sums = {name: _sums(other.cpu(), exact.cpu(), share, host) for name, other in others.items()}
        total = ranks.sum(torch.stack(list(sums.values())).to(entropy.device) * ranks.is_main()).cpu()
        metrics: dict[str, float] = {}
        for name, (same, same_of, gain, gain_of, rank, rank_of) in zip(sums, total.tolist(), strict=True):
            if gain_of > 0 and same_of and rank_of:
                metrics |= {f"{name}overlap": same / same_of, f"{name}gain": gain / gain_of}
                metrics |= {f"{name}spearman": rank / rank_of}
        metrics["ceiling"] = metrics.pop("ceiling_gain", 1.0)
        verdict = self._judge(metrics)
        named = {f"audit/{name}": value for name, value in (*metrics.items(), ("failures", float(self._failures)))}
        return AuditResult(named, *verdict)

    def _exact(self, batch: PackedBatch, drawing: str) -> Float[Tensor, " T"]:
        rng = PackRng(self.seed, source_packs(batch), drawing)
        return measure_entropy(self.entropy_fn, batch, self.signal, self.passes, self.mask_id, rng)

    def _judge(self, metrics: dict[str, float]) -> tuple[str | None, str | None]:
        """The next source, if it takes over now, and a message. Flat entropies count neither as failure nor success."""
        if "gain" not in metrics:
            return None, "The exact entropies of the audited text are all alike, so the source cannot be judged."
        least = self.config.threshold * metrics["ceiling"]
        if metrics["gain"] >= least:
            self._failures = 0
            return None, None
        self._failures += 1
        sentence = (
            f"The entropy source {self.source!r} captured {metrics['gain']:.2f} of the gain, under "
            f"{least:.2f} ({self.config.threshold:g} of the ceiling {metrics['ceiling']:.2f}): "
            f"audit {self._failures} in a row."
        )
        if self._failures < self.config.patience or self._place + 1 == len(self._sources):
            return None, sentence
        self._place += 1
        self._failures = 0
        return self.source, f"{sentence} From now on {self.source!r} is used."

    def state_dict(self) -> dict[str, Tensor]:
        """Which source is in use, and its failures in a row."""
        return {"place": torch.tensor([self._place]), "failures": torch.tensor([self._failures])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state."""
        self._place, self._failures = int(state["place"]), int(state["failures"])


def _sums(entropy: Tensor, exact: Tensor, share: float, batch: PackedBatch) -> Float[Tensor, " six"]:
    """Sum and number of overlaps, captured and possible gain, sum and number of correlations."""
    same, rank = overlap(entropy, exact, share, batch), spearman(entropy, exact, batch)
    captured, possible = _gains(entropy, exact, share, batch)
    sums = [same.nansum(), same.isfinite().sum(), captured, possible, rank.nansum(), rank.isfinite().sum()]
    return torch.stack([value.double() for value in sums])
