"""The folder of a study: record its plan, and refuse a folder of another plan.

plan.json                       the plan, with everything that decides its results
runs/ARM/BUDGET/seed-N          run folders of `megamask pretrain`
cells/ARM/BUDGET/seed-N/NAME    folders of `megamask evaluate`
jobs/ARM/BUDGET/seed-N...       which commands have ended, and their output
results.jsonl  report.html ...  all results
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamask.data.mixed_sources import joined_fingerprint
from megamask.data.shards import Shards
from megamask.errors import ConfigError, DataError
from megamask.evaluation import cells
from megamask.storage import atomic_write, strict_json
from megamask.storage.dotted import flatten
from megamask.study.plan import StudyPlan, plan_record
from megamask.study.planned_cost import folders_of_words, planned_folders

PLAN = "plan.json"
FINISHED = (*cells.FINISHED, "runs/**/step-*/MANIFEST.json")
"""The files of finished work in the folder of a study, as patterns: cells and checkpoints."""
MAY_DIFFER = (
    "question",
    "notes",
    "text",
    "tasks_data",
    "score_sd",
    "tokens_per_second",
    "mean_tasks",
    "mean_mode",
    "mean_variant",
)
"""Parts of a plan that do not affect what is computed. Text is compared by its hash."""


def open_study(folder: Path, plan: StudyPlan, text: Path | Sequence[str], *, write: bool = True) -> list[str]:
    """Record the plan in ``folder``, or only compare it; returns a line for each addition to the recorded plan.

    ``text`` names folders of shards, perhaps with shares. Arms, seeds, budgets and evaluations may be added.
    ConfigError, with every difference, if anything else differs: existing results would be lost or belong to another
    study. Several processes may work on one study.
    """
    record = _record(plan, text)
    if not write:
        return check_plan(folder, record)
    with cells.storage_errors(folder, FINISHED):
        folder.mkdir(parents=True, exist_ok=True)
        additions = check_plan(folder, record)
        atomic_write.write_atomic(folder / PLAN, json.dumps(record, indent=1) + "\n")
    return additions


def check_plan(folder: Path, record: dict[str, Any]) -> list[str]:
    """Compare the plan of ``folder`` with that of ``record``: a line for each addition; ConfigError for differences."""
    path = folder / PLAN
    if not path.exists():
        return []
    cure = "If the plan is the one of this study, delete the file: it will be written again."
    content = strict_json.read_object(path, DataError, f"{path} is missing.", cure)
    try:
        before, now = _by_name(content), _by_name(record)
    except (TypeError, AttributeError, KeyError):
        raise DataError(f"{path} is not the plan of a study. {cure}") from None
    if not content.keys() >= {"arm", "seeds", "budgets"}:
        raise DataError(f"{path} is not the plan of a study: it has no arms, seeds or budgets. {cure}")
    problems, additions = [], []
    for name in sorted(before.keys() | now.keys()):
        if name.partition(".")[0] in MAY_DIFFER or before.get(name) == now.get(name):
            continue
        if name not in before:
            additions.append(f"`{name}` is new in the plan: {now[name]!r}.")
        else:
            problems.append(f"`{name}` is {now.get(name, 'missing')!r}, but {before[name]!r} in {path}.")
    if problems:
        raise ConfigError(
            *problems, f"{folder} holds the study of another plan. Choose another --output, or restore its plan."
        )
    return additions


def _record(plan: StudyPlan, text: Path | Sequence[str]) -> dict[str, Any]:
    shards = [Shards.open(each) for each in folders_of_words(planned_folders(text))]
    hashes = {"text_hash": joined_fingerprint(shards)} if shards else {}
    return {**plan_record(plan), **hashes}


def _by_name(record: dict[str, Any]) -> dict[str, Any]:
    """The plan as flat settings, with arms, evaluations, seeds and budgets by their names instead of their order."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if name in ("arm", "evaluation"):
            for each in value:
                flat |= flatten({f"{name} {each.get('name')}": each})
        elif name in ("seeds", "budgets"):
            flat |= {f"{name} {each}": True for each in value}
        elif name == "axis":
            flat |= {
                f"axis {each['setting']} {value}": sorted(each["arms"]) for each in value for value in each["values"]
            }
        else:
            flat |= flatten({name: value})
    return flat
