"""The last section of a report: what is missing, and the versions, machine, text and command behind each number."""

from __future__ import annotations

from collections import Counter

from megamask.study.comparison import StudyComparison, missing_runs
from megamask.study.measures import seeds_of
from megamask.study.report_blocks import Block, Entry, ItemList, ReportTable, Section
from megamask.study.report_scores import arm_entry, is_empty
from megamask.study.results import StudyResults

MOST_COMMANDS = 2000
"""Commands of cells in a report, so that it stays small."""


def provenance_section(comparison: StudyComparison) -> Section:
    """Where each number comes from, and what is missing."""
    results = comparison.results
    blocks: list[Block] = []
    missing = missing_runs(results)
    failed = [
        f"{arm}, seed {seed}, {budget}, {cell.key.task} ({cell.key.mode}): {cell.state}: {cell.reason or 'no reason'}"
        for (arm, seed, budget), cells in results.cells.items()
        for cell in cells
        if cell.state != "ok"
    ]
    blocks.append(ItemList("Runs that are missing or failed", tuple(missing) or ("None.",)))
    blocks.append(ItemList("Cells that collapsed or failed", tuple(failed) or ("None.",), folded=len(failed) > 10))
    blocks.append(_provenance_table(results))
    blocks.append(_settings_table(results))
    commands = tuple(dict.fromkeys(run.command for run in results.runs))
    blocks.append(ItemList("A command for each pretraining run", commands, folded=True, code=True))
    of_cells = tuple(dict.fromkeys(cell.command for cells in results.cells.values() for cell in cells))
    shown, more = of_cells[:MOST_COMMANDS], len(of_cells) - MOST_COMMANDS
    if more > 0:
        shown = (*shown, f"# {more} more: the column `command` of each cell in results.jsonl")
    blocks.append(ItemList("A command for each cell", shown, folded=True, code=True))
    return Section("provenance", "Provenance", tuple(block for block in blocks if not is_empty(block)))


def _provenance_table(results: StudyResults) -> ReportTable:
    """Every value of each fact, with the number of its runs where runs differ."""
    facts: dict[str, Counter[str]] = {}
    for run in results.runs:
        for name, value in run.provenance.items():
            facts.setdefault(name, Counter())[value] += 1
    rows = [("plan", results.plan_hash)]
    for name, runs_with in facts.items():
        several = len(runs_with) > 1
        values = [
            f"{value} (in {n} of {len(results.runs)} runs)" if several else value for value, n in runs_with.items()
        ]
        rows.append((name, "; ".join(values)))
    cells = tuple((Entry(name), Entry(value)) for name, value in rows)
    return ReportTable("Versions, data and machine", ("What", "Value"), cells)


def _settings_table(results: StudyResults) -> ReportTable:
    rows = []
    for arm in results.arms:
        runs = [run for run in results.runs if run.arm == arm.name]
        hashes = sorted({run.settings[:12] for run in runs})
        seeds = sorted({seed for budget in results.budgets for seed in seeds_of(results, arm.name, budget)})
        rows.append(
            (
                arm_entry(arm),
                Entry(arm.name),
                Entry(", ".join(hashes) or "none"),
                Entry(", ".join(map(str, seeds)) or "none"),
            )
        )
    return ReportTable("Arms", ("Arm", "Name", "Hash of the settings", "Pretraining seeds"), tuple(rows))
