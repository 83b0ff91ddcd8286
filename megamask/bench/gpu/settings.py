"""Settings of `megamask bench-gpu`, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import MinLen

from megamask.config.time_budget import parse_duration
from megamask.errors import must

PartName = Literal[
    "ceilings", "tests", "attention", "statistics", "steps-base", "steps-large", "entropy-base", "trainer", "late-base",
    "zero", "entropy-large", "steps-xl", "run-base",
]  # fmt: skip
"""In the order in which they are measured."""


@dataclass(frozen=True)
class GpuBenchConfig:
    """Measure everything that needs a GPU, the most important parts first.

    Each part runs in a process of its own, so a part that fails or hangs costs only its figures. Each figure becomes a
    line of `figures.jsonl` as soon as it is measured; `report.html` shows the figures beside the goals, and `log.txt`
    has the output. The same command again measures what is missing and what failed. Exit codes: 0 if every part is
    finished, 1 if one failed, 75 if the time ended before.
    """

    output: Path = Path("runs/gpu")
    """Folder of the figures. It may contain figures of other machines; a part counts as finished only if this machine
    measured it."""
    parts: Annotated[tuple[PartName, ...], MinLen(1)] | None = None
    """Parts to measure, in the usual order; without it all of them."""
    limit: str = "55m"
    """Time for all parts together: a number with one of the units s, m, h, d. A part does not start if the remaining
    time is probably too short for it, and a part that is running at the end is stopped."""
    run_time: str = "5m"
    """Training time of the part `run-base`."""
    size: Literal["full", "tiny"] = "full"
    """`full` needs CUDA; `tiny` tries every part with very little work on any machine, and its figures mean nothing."""
    data: Path | None = None
    """Folder of token shards (`megamask prepare` makes it); without it, English text found on this machine."""
    again: bool = False
    """Measure finished parts too; the newest figures count."""
    in_process: bool = False
    """Run the parts in this process, for a debugger: no part is stopped by the time limit."""

    def problems(self, name: str) -> list[str]:
        """Sentences for times that are not times."""
        rule = "be a time above 0 with one of the units s, m, h, d, such as 55m"
        times = {"limit": self.limit, "run_time": self.run_time}
        return [must(setting, rule, value) for setting, value in times.items() if not parse_duration(value)]

    @property
    def limit_seconds(self) -> float:
        """`limit` in seconds."""
        return parse_duration(self.limit) or 0.0

    @property
    def run_seconds(self) -> float:
        """`run_time` in seconds."""
        return parse_duration(self.run_time) or 0.0
