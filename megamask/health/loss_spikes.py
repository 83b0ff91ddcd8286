"""Decide, before the weights of a step move, what to do about NaN, Inf or a loss spike.

A step is a spike if its loss, or the norm of its gradient, is more than `sigma` standard deviations above the mean of
the last `window` steps. This is the rule of OLMo-core's skip-step optimizer (6 sigma, 128 steps), which drops the
step. Rewinding automates what PaLM did by hand (Chowdhery et al. 2022, section 5.1): restart from a checkpoint about
100 steps before the spike and skip 200 to 500 batches. The batches were not bad by themselves: after another
checkpoint they caused no spike.

Differs from OLMo-core: a value above the bound enters the window as the bound, so one huge value hides no later spike,
and a lasting change is accepted after some steps; and the window is emptied when the run itself changes its regime,
such as the number of targets.

Every decision is a function of measurements that are the same on all ranks, and of state in the checkpoint, so a
resumed run decides what an uninterrupted run would. Costs some hundred operations of the host per step.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

from megamask.errors import NonFiniteError
from megamask.health.settings import SpikesConfig

CURE = "Lower `optimizer.lr.peak`, lengthen `optimizer.lr.warmup`, or lower `optimizer.max_grad_norm`."
RECENT = 100
"""Window, in steps, in which non-finite steps are counted."""
TOLERANCE = 0.1
"""Relative change of a number of the regime that still counts as the same regime."""


@dataclass(frozen=True)
class SkippedPacks:
    """The packs that a step reads after rewinds: those of step ``step + shift(step)`` of a run without rewinds.

    ``entries`` are pairs (first step, shift from this step on), both ascending. The shift is a function of the step
    alone, so it is the same for any number of ranks and after any resume.
    """

    entries: tuple[tuple[int, int], ...] = ()

    def shift(self, step: int) -> int:
        """The number of steps by which the packs of ``step`` (from 0) are shifted."""
        return next((shift for first, shift in reversed(self.entries) if first <= step), 0)

    def rewound(self, to: int, step: int) -> SkippedPacks:
        """The entries after a rewind from within ``step`` back to ``to`` steps: what was read in between is skipped."""
        kept = tuple(entry for entry in self.entries if entry[0] < to)
        return SkippedPacks((*kept, (to, step + 1 + self.shift(step) - to)))


@dataclass(frozen=True)
class Regime:
    """What the schedules of a run demand of a step. Losses of different regimes are not comparable."""

    targets: float
    """Number of targets, over all ranks."""
    random_share: float = 1.0
    """Share of the masks that are chosen at random."""
    teacher_weight: float = 0.0
    """Weight of the teacher's targets in the loss."""

    def is_close(self, other: Regime) -> bool:
        """Whether each number differs by at most 10 %."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) for a, b in pairs)


@dataclass(frozen=True)
class StepDecision:
    """What happens to a step: whether its weights move, whether the run rewinds, and a sentence for the log."""

    moves: bool = True
    rewinds: bool = False
    sentence: str = ""


class SpikePolicy:
    """Decides about each step before its weights move. The same on every rank, given the same numbers."""

    def __init__(self, config: SpikesConfig, state: dict[str, Any] | None = None):
        """``state`` is what ``state`` returned when a checkpoint was written."""
        self.config = config
        state = state or {}
        self.skipped_packs = SkippedPacks(tuple((first, shift) for first, shift in state.get("ledger", ())))
        self.spikes: int = state.get("spikes", 0)
        """Spikes so far."""
        self.dropped: int = state.get("dropped", 0)
        """Steps so far whose weights did not move."""
        self.rewinds: int = state.get("rewinds", 0)
        """Rewinds so far."""
        self._nonfinite_steps: list[int] = list(state.get("broken", ()))
        regime = state.get("asked")
        self._regime = Regime(*regime) if regime else None
        self._past: dict[str, list[float]] = {
            name: list(state.get("past", {}).get(name, ()))[-config.window :] for name in ("loss", "gradient norm")
        }

    def state(self) -> dict[str, Any]:
        """Counts and history, as JSON can store them without loss."""
        return {
            "ledger": [list(entry) for entry in self.skipped_packs.entries],
            "spikes": self.spikes,
            "dropped": self.dropped,
            "rewinds": self.rewinds,
            "broken": self._nonfinite_steps,
            "asked": list(astuple(self._regime)) if self._regime else [],
            "past": self._past,
        }

    def rewound(self, state: dict[str, Any], to: int, step: int) -> SpikePolicy:
        """The policy of a checkpoint's ``state`` after a rewind from ``step`` (from 0) to ``to`` steps."""
        counts = {"spikes": self.spikes, "dropped": self.dropped, "rewinds": self.rewinds + 1}
        skipped_packs = self.skipped_packs.rewound(to, step)
        return SpikePolicy(self.config, state | counts | {"ledger": skipped_packs.entries})

    def decide(self, step: int, loss: float, grad_norm: float, regime: Regime) -> StepDecision:
        """The decision about ``step`` (from 0), whose loss and gradient norm are finite."""
        if self._regime is None or not regime.is_close(self._regime):
            self._past = {name: [] for name in self._past}
        self._regime = regime
        reasons = []
        for (name, past), value in zip(self._past.items(), (loss, grad_norm), strict=True):
            bound = self._bound(past)
            if value > bound:
                reasons.append(f"its {name} {value:.4g} is above {bound:.4g}")
            past.append(min(value, bound))
            del past[: -self.config.window]
        return self._spike(step, " and ".join(reasons)) if reasons else StepDecision()

    def drop_nonfinite(self, step: int, cause: str) -> StepDecision:
        """The decision about ``step`` (from 0), whose loss or gradient norm is NaN or Inf; ``cause`` says which.

        Raises NonFiniteError if there are too many such steps.
        """
        self.dropped += 1
        recent = [other for other in self._nonfinite_steps if other > step - RECENT]
        self._nonfinite_steps = [*recent, step]
        row = next((n for n in range(1, RECENT) if step - n not in self._nonfinite_steps), RECENT)
        sentence = f"Step {step + 1} was dropped, its weights did not move: {cause}."
        count = len(self._nonfinite_steps)
        if row < self.config.max_nonfinite_in_row and count < self.config.max_nonfinite_in_100:
            return StepDecision(False, sentence=sentence)
        raise NonFiniteError(
            f"{sentence} It is the last of {row} such steps in a row, and of {count} among the last {RECENT}. No "
            f"checkpoint contains them: the same command resumes from the newest one. {CURE}"
        )

    def _bound(self, past: list[float]) -> float:
        if len(past) < self.config.window // 2:
            return math.inf
        mean = math.fsum(past) / len(past)
        return mean + self.config.sigma * math.sqrt(math.fsum((value - mean) ** 2 for value in past) / len(past))

    def _spike(self, step: int, reason: str) -> StepDecision:
        self.spikes += 1
        bound = f"the mean of the last steps plus {self.config.sigma:g} standard deviations"
        sentence = f"Step {step + 1} is a spike: {reason}, {bound}."
        if self.config.policy == "log":
            return StepDecision(sentence=sentence)
        self.dropped += 1
        rewinds = self.config.policy == "rewind" and self.rewinds < self.config.max_rewinds
        return StepDecision(False, rewinds, f"{sentence} It was dropped: its weights did not move.")
