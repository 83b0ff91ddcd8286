"""The settings of `megamask study`; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from megamask.errors import must
from megamask.errors.setting_rules import Count


@dataclass(frozen=True)
class StudyConfig:
    """Train and evaluate every arm of a plan with every seed, and report the differences with their intervals."""

    plan: tyro.conf.Positional[str] = ""
    """A plan (a TOML file), or the name of one that megamask ships: `--list-plans` prints them."""
    output: Path | None = None
    """Folder of the study: runs, cells, logs, results.jsonl and the report. None: studies/NAME. The same command
    continues a study that was stopped."""
    data: tuple[Path, ...] = ()
    """Folder of token shards, or folders of a mixture, perhaps with shares (FOLDER=SHARE), instead of the `text` of the
    plan. The same for all arms; an axis over `data` in the plan compares several texts."""
    tasks_data: Path | None = None
    """Folder of the evaluation tasks, instead of the `tasks_data` of the plan; see `megamask evaluate --data`."""
    jobs: Count | None = None
    """Number of runs at a time, each on an equal share of the cores, or on its own GPU. None: one for each GPU, or
    one."""
    only: tuple[str, ...] = ()
    """Run only these parts: ARM, ARM/seed-N, ARM/BUDGET/seed-N, or the number of a run that `--dry-run` prints."""
    dry_run: bool = False
    """Check the plan; print runs, tokens, FLOPs, time, disk and the smallest effect that the seeds can show."""
    report: bool = False
    """Write results.jsonl and the report from the results so far, then exit."""
    list_plans: bool = False
    """Print the plans that megamask ships, then exit."""

    def problems(self, name: str) -> list[str]:
        """Sentences for flags that exclude each other."""
        problems = []
        if not self.plan and not self.list_plans:
            cure = " Write it first: a flag such as --data takes all words after it." if self.data or self.only else ""
            problems.append(
                f"`plan` must name a TOML file or a plan that megamask ships: --list-plans prints them.{cure}"
            )
        if self.output is not None:
            there = next((path for path in (self.output, *self.output.parents) if path.exists()), None)
            if there and not there.is_dir():
                problems.append(must("output", "be a folder, or a path where nothing is yet", str(there)))
        if self.dry_run and self.report:
            problems.append(must("report", "be left out with `dry_run`", self.report))
        return problems
