"""How far a run has come: by its steps, or by the time that it has trained of a budget, whichever is further.

With a budget every schedule runs on time, so a run on any machine has warmed up, decayed and ended at its deadline.
The idea: "How to Train BERT with an Academic Budget" (Izsak, Berchansky, Levy 2021), where the learning rate is at 0
after 24 hours. A clock then decides: such a run cannot be repeated bit for bit.

Costs nothing without a budget, and with one a message of one number per step.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from megamask.config.time_budget import parse_duration as seconds
from megamask.runtime import ranks


class Progress:
    """The progress of a run, in [0, 1], the same on all ranks: they go by the clock of rank 0.

    ``used`` seconds were trained before this launch. What passes between launches does not count, nor what was lost
    with a launch that died before it saved; evaluating and saving do count.
    """

    def __init__(
        self, steps: int, budget: str | None = None, used: float = 0.0, now: Callable[[], float] = time.monotonic
    ):
        self.steps, self.budget = steps, seconds(budget) if budget else None
        self._before, self._now, self._began = used, now, now()
        self._share = self._earlier = self._of(used)

    def _of(self, used: float) -> float:
        return min(1.0, used / self.budget) if self.budget else 0.0

    @property
    def used(self) -> float:
        """Seconds of training so far, by this rank's clock."""
        return self._before + self._now() - self._began

    @property
    def left(self) -> float | None:
        """Seconds that are left of the budget; None without one."""
        return None if self.budget is None else (1 - self._share) * self.budget

    def ending(self, step: int) -> str:
        """What there is to say of a run with a budget that ended after ``step`` steps."""
        if self.budget is None:
            return ""
        if self._share < 1:
            spared = (1 - self._share) * 100
            return (
                f"All {self.steps:,} steps are done with {spared:.0f} % of `time_budget` left. Raise `steps` to use it."
            )
        return f"`time_budget` is used up after {step:,} steps."

    def tick(self) -> None:
        """Before a step: agree what time it is. Collective."""
        if self.budget:
            mine = torch.tensor(self.used if ranks.is_main() else 0.0, dtype=torch.float64)
            self._earlier, self._share = self._share, self._of(ranks.sum(mine).item())

    def at(self, step: int) -> float:
        """The progress after ``step`` steps, as of the last tick."""
        return self._of_both(step, self._share)

    def began(self, step: int) -> float:
        """The progress where ``step`` (from 0) begins: by its number, or by the clock when the step before it began.

        So it is below 1 for the last step too, which has progress 1 when a deadline finds it.
        """
        return self._of_both(step, self._earlier)

    def then(self, step: int, used: float) -> float:
        """The progress after ``step`` steps and ``used`` seconds."""
        return self._of_both(step, self._of(used))

    def _of_both(self, step: int, share: float) -> float:
        return max(step / self.steps, share)

    def over(self, step: int) -> bool:
        """Whether the run ends after ``step`` steps. The step that a deadline finds is the last: it has progress 1."""
        return self.at(step) >= 1
