"""The progress of a run: the share of its steps, or of its time budget, whichever is larger.

With a budget every schedule runs on time, so a run on any machine warms up, decays and ends at its deadline. Source:
"How to Train BERT with an Academic Budget" (Izsak, Berchansky, Levy 2021), where the learning rate reaches 0 after 24
hours. The clock then decides, so such a run cannot be repeated bit for bit.

Costs nothing without a budget, and one all-reduce of a number per step with one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from megamask.config.time_budget import parse_duration as seconds
from megamask.runtime import ranks


class Progress:
    """The progress of a run, in [0, 1], by the clock of rank 0 on all ranks.

    ``used`` are the seconds of training before this launch. Evaluation and saving count. The time between launches and
    the steps that a killed launch had not saved do not.
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
        """Remaining seconds of the budget; None without one."""
        return None if self.budget is None else (1 - self._share) * self.budget

    def ending(self, step: int) -> str:
        """A line about the budget of a run that ended after ``step`` steps; empty without a budget."""
        if self.budget is None:
            return ""
        if self._share < 1:
            unused = (1 - self._share) * 100
            return (
                f"All {self.steps:,} steps are done with {unused:.0f} % of `time_budget` left. Raise `steps` to use it."
            )
        return f"`time_budget` is used up after {step:,} steps."

    def tick(self) -> None:
        """Read the clock of rank 0, before each step. Collective."""
        if self.budget:
            used = torch.tensor(self.used if ranks.is_main() else 0.0, dtype=torch.float64)
            self._earlier, self._share = self._share, self._of(ranks.sum(used).item())

    def at(self, step: int) -> float:
        """The progress after ``step`` steps, as of the last tick."""
        return self._largest(step, self._share)

    def began(self, step: int) -> float:
        """The progress at the start of ``step`` (from 0): by its number, or by the clock one step earlier.

        It is below 1 for the last step too, whose progress is 1 if the deadline ends the run.
        """
        return self._largest(step, self._earlier)

    def then(self, step: int, used: float) -> float:
        """The progress after ``step`` steps and ``used`` seconds."""
        return self._largest(step, self._of(used))

    def _largest(self, step: int, share: float) -> float:
        return max(step / self.steps, share)

    def over(self, step: int) -> bool:
        """Whether the run ends after ``step`` steps. The step during which the deadline passes is the last."""
        return self.at(step) >= 1
