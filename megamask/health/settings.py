"""Settings of the watchdog and of loss spikes; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import FiniteFloat

from megamask.errors import must
from megamask.errors.setting_rules import Count, OnlyFor, removable


@dataclass(frozen=True)
class WatchdogConfig:
    """How long a run may make no progress before it ends with the stacks of all ranks."""

    timeout: FiniteFloat = 1800.0
    """Seconds that a step, or reading its packs, may take; 0: no watchdog."""
    rare_timeout: FiniteFloat = 7200.0
    """Timeout in seconds for rare phases: reading the text, building, the first step, an evaluation, a checkpoint,
    the export."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        if self.timeout == 0:
            why = f"has no effect while `{name}.timeout` is 0"
            return removable(self, ("rare_timeout",), name, why, "Remove one.")
        if not self.timeout >= 1:
            return [must(f"{name}.timeout", "be 0, or at least 1", self.timeout)]
        if not self.rare_timeout >= self.timeout:
            return [must(f"{name}.rare_timeout", f"be at least `{name}.timeout` ({self.timeout:g})", self.rare_timeout)]
        return []


@dataclass(frozen=True)
class SpikesConfig:
    """What to do about steps with NaN or Inf, and about steps whose loss is far above the others."""

    policy: Literal["log", "skip", "rewind"] = "log"
    """What to do at a spike. `log`: write a line to the log. `skip`: drop the step, so that no weight changes.
    `rewind`: return to an older checkpoint and continue with other text."""
    sigma: Annotated[FiniteFloat, Gt(1)] = 6.0
    """A spike lies this many standard deviations above the mean, in its loss or the norm of its gradient."""
    window: Annotated[int, Ge(8)] = 128
    """Number of past steps in the mean. Spikes are detected as soon as half of them have been made."""
    rewind_steps: Annotated[Count, OnlyFor("policy", "rewind")] = 100
    """A rewind returns to a checkpoint that is at least this many steps older than the spike."""
    max_rewinds: Annotated[Count, OnlyFor("policy", "rewind")] = 3
    """Largest number of rewinds in a run; later spikes are dropped as by `skip`."""
    max_nonfinite_in_row: Count = 5
    """A step whose loss or gradient is NaN or Inf is dropped; this many in a row end the run (exit code 5)."""
    max_nonfinite_in_100: Annotated[int, Ge(1), Le(100)] = 10
    """This many among the last 100 steps end it too."""
