"""The settings of the watchdog; without torch."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.errors import must, removable


@dataclass(frozen=True)
class WatchdogConfig:
    """How long a run may make no progress before it ends with the stacks of all ranks."""

    timeout: float = 1800.0
    """Seconds that a step may take, or its packs; 0: no watch is kept."""
    rare_timeout: float = 7200.0
    """Timeout in seconds for rare phases: reading the text, building, the first step, an evaluation, a checkpoint,
    the export."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong."""
        if self.timeout == 0:
            why = f"has no effect while `{name}.timeout` is 0"
            return removable(self, ("rare_timeout",), name, why, "Remove one.")
        if not self.timeout >= 1:
            return [must(f"{name}.timeout", "be 0, or at least 1", self.timeout)]
        if not self.rare_timeout >= self.timeout:
            return [must(f"{name}.rare_timeout", f"be at least `{name}.timeout` ({self.timeout:g})", self.rare_timeout)]
        return []
