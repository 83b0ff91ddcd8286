"""What is done about a step that is no number, or far from all before it; decided before its weights move.

A step is a spike if its loss, or the norm of its gradient, lies more than `sigma` standard deviations above the mean
of the last `window` steps. That is the rule of OLMo-core's skip-step optimizer (6 sigma, 128 steps), which drops the
step. Rewinding is what PaLM did by hand (Chowdhery et al. 2022, section 5.1): back to a checkpoint from about 100
steps before the spike, then on with other batches, 200 to 500 of them left out; the batches were not to blame by
themselves, for met from another checkpoint they did no harm.

Differs from OLMo-core: a value above the bound enters the window as the bound, so that one huge value hides no later
one, and a lasting change is accepted after some steps; and the window begins anew when the run itself asks for
something else (another number of targets), which is no fault.

Everything here is a function of what was measured, alike on all ranks, and of state that lies in the checkpoint: a
resumed run decides what the run would have. Costs some hundred operations of the host per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megamask.errors import NonFiniteError, must, removable

CURE = "Lower `optimizer.lr.peak`, lengthen `optimizer.lr.warmup`, or lower `optimizer.max_grad_norm`."
RECENT = 100
"""Steps in which those that were no numbers are counted."""
SAME = 0.1
"""What a step asks for may change by this share without being something else."""


@dataclass(frozen=True)
class SpikesConfig:
    """What to do about steps with NaN or Inf, and about steps whose loss is far above the others."""

    policy: Literal["log", "skip", "rewind"] = "log"
    """What a spike leads to. `log`: a line. `skip`: the step is dropped, its weights do not move. `rewind`: back to an
    older checkpoint, and on with other text."""
    sigma: float = 6.0
    """A spike lies this many standard deviations above the mean, in its loss or the norm of its gradient."""
    window: int = 128
    """Steps of which the mean is; half of them must have been before the first spike is told."""
    rewind_steps: int = 100
    """A checkpoint must be this many steps older than a spike to go back to it; for `rewind` alone."""
    max_rewinds: int = 3
    """Most rewinds of a run; later spikes are dropped as by `skip`. For `rewind` alone."""
    max_nonfinite_in_row: int = 5
    """A step of which the loss or gradient is no number is dropped; so many in a row end the run (exit code 5)."""
    max_nonfinite_in_100: int = 10
    """So many among the last 100 steps end it too."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong."""
        found = []
        if not 1 < self.sigma < math.inf:
            found.append(must(f"{name}.sigma", "be above 1", self.sigma))
        if self.window < 8:
            found.append(must(f"{name}.window", "be at least 8", self.window))
        counts = ("rewind_steps", "max_rewinds", "max_nonfinite_in_row", "max_nonfinite_in_100")
        found += [must(f"{name}.{part}", "be at least 1", n) for part in counts if (n := getattr(self, part)) < 1]
        if self.max_nonfinite_in_100 > RECENT:
            found.append(must(f"{name}.max_nonfinite_in_100", "be at most 100", self.max_nonfinite_in_100))
        if self.policy != "rewind":
            found += removable(
                self, ("rewind_steps", "max_rewinds"), name, "has an effect on the policy 'rewind' alone"
            )
        return found


@dataclass(frozen=True)
class SkippedPacks:
    """Which packs a step reads once spans were left out: those of step ``step + shift(step)`` of a run that skips none.

    ``entries`` are pairs: from this step on, shift by so many steps; both rise. A function of the step alone, so any
    number of ranks and any resume see the same packs.
    """

    entries: tuple[tuple[int, int], ...] = ()

    def shift(self, step: int) -> int:
        """By how many steps the packs of ``step`` (from 0) lie further on."""
        return next((shift for first, shift in reversed(self.entries) if first <= step), 0)

    def rewound(self, to: int, step: int) -> SkippedPacks:
        """The ledger after a rewind from within ``step`` back to ``to`` steps: what was read in between is left out."""
        kept = tuple(entry for entry in self.entries if entry[0] < to)
        return SkippedPacks((*kept, (to, step + 1 + self.shift(step) - to)))


@dataclass(frozen=True)
class StepDecision:
    """What becomes of a step: whether its weights move, whether the run goes back, and what there is to say."""

    moves: bool = True
    rewinds: bool = False
    sentence: str = ""


class SpikePolicy:
    """Judges each step before its weights move. The same on every rank, given the same numbers."""

    def __init__(self, config: SpikesConfig, state: dict[str, Any] | None = None):
        """``state`` is what ``state`` said when a checkpoint was made."""
        self.config = config
        state = state or {}
        self.ledger = SkippedPacks(tuple((first, shift) for first, shift in state.get("ledger", ())))
        self.spikes: int = state.get("spikes", 0)
        """Spikes so far."""
        self.dropped: int = state.get("dropped", 0)
        """Steps of which the weights did not move, so far."""
        self.rewinds: int = state.get("rewinds", 0)
        """Rewinds so far."""
        self._broken: list[int] = list(state.get("broken", ()))
        self._asked: list[float] = list(state.get("asked", ()))
        self._past: dict[str, list[float]] = {
            name: list(state.get("past", {}).get(name, ()))[-config.window :] for name in ("loss", "gradient norm")
        }

    def state(self) -> dict[str, Any]:
        """What was counted and seen, as JSON can hold it without loss."""
        return {
            "ledger": [list(entry) for entry in self.ledger.entries],
            "spikes": self.spikes,
            "dropped": self.dropped,
            "rewinds": self.rewinds,
            "broken": self._broken,
            "asked": self._asked,
            "past": self._past,
        }

    def rewound(self, state: dict[str, Any], to: int, step: int) -> SpikePolicy:
        """The judge of a checkpoint's ``state``, which knows of the rewind from ``step`` (from 0) to ``to`` steps."""
        counts = {"spikes": self.spikes, "dropped": self.dropped, "rewinds": self.rewinds + 1}
        ledger = self.ledger.rewound(to, step)
        return SpikePolicy(self.config, state | counts | {"ledger": ledger.entries})

    def __call__(
        self, step: int, loss: float, grad_norm: float, asked: tuple[float, ...], where: Callable[[], str]
    ) -> StepDecision:
        """The verdict on ``step`` (from 0).

        ``asked`` are numbers that say what the step asks for; ``where`` finds out what is no number, and is called on
        all ranks or on none. Raises NonFiniteError if too many steps were no numbers.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._no_number(step, where())
        if not _alike(list(asked), self._asked):
            self._past = {name: [] for name in self._past}
        self._asked = list(asked)
        high = []
        for (name, past), value in zip(self._past.items(), (loss, grad_norm), strict=True):
            bound = self._bound(past)
            if value > bound:
                high.append(f"its {name} {value:.4g} lies above {bound:.4g}")
            past.append(min(value, bound))
            del past[: -self.config.window]
        return self._spike(step, " and ".join(high)) if high else StepDecision()

    def _bound(self, past: list[float]) -> float:
        if len(past) < self.config.window // 2:
            return math.inf
        mean = math.fsum(past) / len(past)
        return mean + self.config.sigma * math.sqrt(math.fsum((value - mean) ** 2 for value in past) / len(past))

    def _spike(self, step: int, why: str) -> StepDecision:
        self.spikes += 1
        told = f"Step {step + 1} is a spike: {why}, the mean of the last steps and {self.config.sigma:g} deviations"
        if self.config.policy == "log":
            return StepDecision(sentence=f"{told}.")
        self.dropped += 1
        rewinds = self.config.policy == "rewind" and self.rewinds < self.config.max_rewinds
        return StepDecision(False, rewinds, f"{told}. It was dropped: its weights did not move.")

    def _no_number(self, step: int, where: str) -> StepDecision:
        self.dropped += 1
        self._broken = [other for other in self._broken if other > step - RECENT] + [step]
        row = next((n for n in range(1, RECENT) if step - n not in self._broken), RECENT)
        told = f"Step {step + 1} was dropped, its weights did not move: {where}."
        if row < self.config.max_nonfinite_in_row and len(self._broken) < self.config.max_nonfinite_in_100:
            return StepDecision(False, sentence=told)
        raise NonFiniteError(
            f"{told} It is the last of {row} such steps in a row, and of {len(self._broken)} among the last {RECENT}. "
            f"No checkpoint holds them: the same command goes on from the newest. {CURE}"
        )


def _alike(asked: list[float], before: list[float]) -> bool:
    if len(asked) != len(before):
        return False
    return all(abs(a - b) <= SAME * max(abs(a), abs(b)) for a, b in zip(asked, before, strict=True))
