"""The settings that choose a source of entropy; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import FiniteFloat

from megamask.basic_types import Measure
from megamask.errors import Removable, must
from megamask.errors.setting_rules import Count, OnlyFor, ShareInside, removable

Signal = Literal["clean", "masked"]
Kind = Literal["none", "frequency", "probe", "sidecar", "exact", "teacher"]


@dataclass(frozen=True)
class AuditConfig:
    """How often the source in use is compared with the exact signal, and when it is replaced."""

    every: Count | None = None
    """Steps between two audits of one micro-batch; None: no audits. Each costs one pass without gradients (`clean`) or
    twice `num_passes` (`masked`): every 200 steps, with one micro-batch a step, about 0.2 % or 1.5 % of the time."""
    threshold: Annotated[ShareInside, OnlyFor("every")] = 0.85
    """Captured gain, as a share of its ceiling, below which an audit counts as failed."""
    patience: Annotated[Count, OnlyFor("every")] = 3
    """Failed audits in a row after which the next source takes over."""
    fall_back: Annotated[tuple[Kind, ...], OnlyFor("every")] = ()
    """The sources that take over, in this order; empty: a failure is logged, and the source stays."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong beyond a range."""
        if "none" in self.fall_back or len(set(self.fall_back)) < len(self.fall_back):
            return [must(f"{name}.fall_back", "name different sources, none of them 'none'", self.fall_back)]
        return []


@dataclass(frozen=True)
class EntropyConfig:
    """The source of the entropies by which tokens are masked."""

    source: Kind = "none"
    """`frequency`: minus log unigram probability; `probe`: a small network that learns from the losses;
    `sidecar`: a byte per token beside the shards; `exact`: a pass of the model itself; `teacher`: a pass of a frozen
    model. `none` is for scores that need no entropy."""
    signal: Annotated[Signal, OnlyFor("source")] = "masked"
    """What the model sees at a token whose entropy is computed. The two signals are different quantities (in two small
    models, the top 20 % of the tokens by one and by the other have 0.60 and 0.65 of their tokens in common), and the
    meaning of `clean` depends on the corruption in training:

    `masked`: the token is hidden under [MASK], as in the loss, under any corruption.

    `clean`: no token is hidden. Under 80/10/10 some targets are visible in training, so the entropy shows how far the
    model trusts its input: low (mean 2.24 nats) and nearly a ranking by rarity (Spearman 0.93 with minus log
    frequency). Under 100 % [MASK] no target is visible in training: the entropy is untrained, higher than at masked
    tokens (mean 5.21 against 4.65 nats), and correlates little with frequency (0.35).

    The figures were measured for this project on two models of 4 layers of width 128 with 8,192 tokens, which differ
    only in the corruption, after 1,200 and 1,000 steps on books, one seed each: only their order is reliable."""
    measure: Annotated[Measure, OnlyFor("source")] = "shannon"
    """Measure of uncertainty, in nats: `shannon`: entropy; `renyi`: entropy of order 2; `min`: -log of the probability
    of the most likely token; `margin`: log of the ratio of the second most likely to the most likely, at most 0;
    `loss`: -log of the probability of the true token, which needs the label."""
    num_passes: Annotated[Count, OnlyFor("source")] = 4
    """Number of groups of tokens that are hidden in turn, for `masked`: 1/num_passes of a pack at a time."""
    candidates: Annotated[Annotated[FiniteFloat, Ge(1)] | None, OnlyFor("source")] = None
    """Tokens for which `exact` computes the entropy, as a multiple of the mask budget, proposed by the probe; None: all
    tokens. The probe predicts the signal `masked`; for `clean` it is a proxy, which an audit can evaluate."""
    ema_decay: Annotated[ShareInside | None, OnlyFor("source")] = None
    """Decay per step of the moving average of the weights that `exact` uses; None: the current weights."""
    audit: Annotated[AuditConfig, OnlyFor("source")] = field(default_factory=AuditConfig)
    """How the source is monitored."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        if self.source == "none":
            return []
        problems = self._without_effect(name)
        if "probe" in self.kinds and self.signal != "masked":
            rule = "be 'masked' for the source 'probe', which learns only from losses at masked tokens"
            problems.append(must(f"{name}.signal", rule, self.signal))
        if self.source in self.audit.fall_back:
            problems.append(must(f"{name}.audit.fall_back", f"name other sources than {self.source!r}", self.source))
        return problems

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The source and those that may take over."""
        return (self.source, *self.audit.fall_back)

    def _without_effect(self, name: str) -> list[str]:
        """Sentences for settings that differ from their default and have no effect."""
        runs_model, audits = self.source in ("exact", "teacher"), self.audit.every is not None
        problems: list[str] = []
        if self.source == "frequency" and not audits:
            why = "has no effect on the source 'frequency' without an audit"
            problems += removable(self, ("signal", "measure"), name, why)
        if not (self.signal == "masked" and (runs_model or audits)):
            why = "has an effect only on the signal 'masked' of 'exact', 'teacher' or an audit"
            problems += removable(self, ("num_passes",), name, why)
        if "exact" not in self.kinds:
            problems += removable(self, ("candidates", "ema_decay"), name, "has an effect only on the source 'exact'")
        same = self.source == "teacher" or (runs_model and self.candidates is None and self.ema_decay is None)
        if audits and same:
            why = f"has no effect on the source {self.source!r}, which would be compared with itself"
            problems.append(Removable(f"{name}.audit.every", why, None))
        return problems
