"""Collect the results of a study so far from its folder, and write them as JSON Lines.

``results.jsonl`` has a line for the study, for each run and for each cell, without the predictions of single examples.
It is enough to keep or share this file: a study continues from it, since a run in it counts as done without its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megamask.checkpoint.run_folder import RunFolder
from megamask.config.pretrain_config import as_dict
from megamask.config.sources import data_folders
from megamask.data import manifest
from megamask.errors import DataError, raise_all
from megamask.evaluation.cells import (
    RESULTS_FILE,
    cell_from_record,
    is_of_evaluation,
    read_cells,
    short_record,
    without_nan,
)
from megamask.evaluation.outcome import Cell
from megamask.metrics.metrics_file import read_metrics
from megamask.storage import atomic_write, strict_json
from megamask.storage.dotted import flatten
from megamask.study.jobs import PRETRAIN, CommandRecord, read_record
from megamask.study.plan import StudyPlan, plan_record
from megamask.study.planned_runs import PlannedRun
from megamask.study.results import Arm, CurvePoint, PretrainingRun, RunKey, StudyResults
from megamask.training.flops import PARTS

MASK_METRICS = ("mask_ratio", "masking/", "masks/", "entropy/", "audit/")
"""Metrics of a run whose means show what was masked, by the beginning of their names."""


def collect_results(plan: StudyPlan, runs: Sequence[PlannedRun], folder: Path) -> StudyResults:
    """The results of the ``runs`` that have begun, failed ones too. Raises DataError for a damaged file."""
    known_runs, known_cells, known_references = read_results(folder / RESULTS_FILE)
    references = {cell.key: cell for cell in known_references}
    folders = {shards for run in runs for shards in data_folders(run.config.data)}
    texts = {shards: _text_facts(shards) for shards in folders}
    measured, cells = list[PretrainingRun](), dict[RunKey, tuple[Cell, ...]]()
    for run in runs:
        record = read_record(run)
        if PRETRAIN in record:
            measured.append(read_run(run, record[PRETRAIN], texts))
        elif run.key in known_runs and known_runs[run.key].settings == run.settings:
            measured.append(known_runs[run.key])
        computed = tuple(cells_of_run(run))
        references |= {cell.key: cell for cell in computed if cell.key.mode == "reference"}
        if own := tuple(cell for cell in computed if cell.key.mode != "reference") or known_cells.get(run.key, ()):
            cells[run.key] = own
    return StudyResults(
        name=plan.name,
        question=plan.question,
        arms=tuple(_arms(plan, runs)),
        seeds=plan.seeds,
        budgets=plan.budgets,
        mean_tasks=plan.mean_tasks,
        mean_mode=plan.mean_mode,
        mean_variant=plan.mean_variant,
        references=tuple(references.values()),
        runs=tuple(measured),
        cells=cells,
        notes=plan.notes,
        plan_hash=hashlib.sha256(json.dumps(plan_record(plan)).encode()).hexdigest(),
    )


def read_run(run: PlannedRun, record: CommandRecord, texts: Mapping[Path, Mapping[str, str]]) -> PretrainingRun:
    """What the log of a run says about it, with the facts in ``texts`` about its folders of shards."""
    provenance = _launch_facts(run)
    for shards in data_folders(run.config.data):
        provenance |= texts[shards]
    lines = read_metrics(RunFolder(run.run_folder).logs / "metrics.jsonl")
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        steps.setdefault(line["step"], {}).update(line)
    totals: dict[str, Any] = {}
    curve = []
    for step, metrics in sorted(steps.items()):
        totals |= {name: value for name, value in metrics.items() if name.startswith(("total/", "flops/"))}
        if metrics.get("valid/loss") is not None:
            flops = sum(totals.get(f"flops/{part}", 0.0) for part in PARTS)
            seconds, tokens = totals.get("total/seconds", 0.0), int(totals.get("total/tokens", 0))
            curve.append(CurvePoint(step, tokens, flops, seconds, metrics["valid/loss"], metrics["valid/accuracy"]))
    return PretrainingRun(
        arm=run.arm.name,
        seed=run.seed,
        budget=run.budget,
        state=record.state,
        reason=record.reason,
        steps=max(steps, default=0),
        tokens=int(totals.get("total/tokens", 0)),
        flops={part: totals.get(f"flops/{part}", 0.0) for part in PARTS},
        seconds=totals.get("total/seconds", record.seconds),
        peak_memory=record.peak_memory,
        curve=tuple(curve),
        masks=_means(steps.values()),
        settings=record.settings or run.settings,
        command=shlex.join(["megamask", "pretrain", *run.pretrain_arguments()]),
        provenance=provenance,
    )


def cells_of_run(run: PlannedRun) -> Iterable[Cell]:
    """The cells of a run, under the name ARM/seed-N."""
    for evaluation in run.evaluations:
        for cell in read_cells(run.cells(evaluation)).values():
            own = replace(cell.key, model=f"{run.arm.name}/seed-{run.seed}")
            yield cell if cell.key.mode == "reference" else replace(cell, key=own)


def write_results(results: StudyResults, path: Path) -> None:
    """Write ``results`` as JSON Lines, without the predictions and labels of single examples."""
    header = {
        field.name: getattr(results, field.name)
        for field in dataclasses.fields(results)
        if field.name not in ("runs", "cells", "references", "arms")
    }
    lines: list[dict[str, Any]] = [{"kind": "study", **header, "arms": [asdict(arm) for arm in results.arms]}]
    lines += [{"kind": "run", **asdict(run)} for run in results.runs]
    lines += [{"kind": "reference", **short_record(cell)} for cell in results.references]
    lines += [
        {"kind": "cell", "arm": arm, "pretraining_seed": seed, "budget": budget, **short_record(cell)}
        for (arm, seed, budget), cells in results.cells.items()
        for cell in cells
    ]
    atomic_write.write_atomic(path, "".join(json.dumps(without_nan(line)) + "\n" for line in lines))


def read_results(path: Path) -> tuple[dict[RunKey, PretrainingRun], dict[RunKey, tuple[Cell, ...]], list[Cell]]:
    """The runs and cells in a ``results.jsonl``, by arm, seed and budget, and the references; none without the file.

    Raises DataError with each line that is damaged, if the file has the results of an evaluation, or if it is a folder.
    """
    runs: dict[RunKey, PretrainingRun] = {}
    cells: dict[RunKey, list[Cell]] = {}
    references: list[Cell] = []
    problems: list[str] = []
    if path.is_dir():
        raise DataError(f"{path} must be a file, but is a folder. Choose another --output, or move the folder.")
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    numbers: dict[str | RunKey, int] = {}  # of the first line with this text, or with this run
    for number, line in enumerate(lines, 1):
        if not line.strip() or numbers.setdefault(line, number) != number:
            continue
        try:
            content = dict(strict_json.parse_json(line))
            if is_of_evaluation(content):
                foreign = (
                    "has results of `megamask evaluate`, not of a study. Choose another --output, or move the file."
                )
                raise DataError(f"{path} {foreign}")
            kind = content.pop("kind")
            if kind == "run":
                run = _RUN.validate_python(content)
                first = numbers.setdefault(run.key, number)
                if first != number:
                    problems.append(
                        f"{path}, line {number}, has another result of the run in line {first}. Delete one of them."
                    )
                runs[run.key] = run
            elif kind == "reference":
                references.append(cell_from_record({"predictions": [], "labels": []} | content))
            elif kind == "cell":
                key = content.pop("arm"), content.pop("pretraining_seed"), content.pop("budget")
                cells.setdefault(key, []).append(cell_from_record({"predictions": [], "labels": []} | content))
        except (ValueError, ValidationError, KeyError, TypeError, AttributeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            problems.append(
                f"{path}, line {number}, is damaged: {reason}. Delete this line: its result will be read from the "
                "folders of the study, or computed again."
            )
    raise_all(DataError, problems)
    return runs, {key: tuple(some) for key, some in cells.items()}, references


_RUN: TypeAdapter[PretrainingRun] = TypeAdapter(PretrainingRun)


def _arms(plan: StudyPlan, runs: Sequence[PlannedRun]) -> Iterable[Arm]:
    first = {run.arm.name: flatten(as_dict(run.config)) for run in reversed(runs)}
    baseline = first.get(plan.arm[0].name, {})
    for arm in plan.arms:
        own = first.get(arm.name, {})
        names = [n for n in own if own[n] != baseline.get(n) and n not in ("seed", "output", "steps", "teacher.path")]
        changes = {name: str(own[name]) for name in names}
        if arm.teacher:
            changes["teacher"] = f"the run of {arm.teacher} with the same seed"
        if arm.budget_share != 1:
            changes["budget"] = f"{arm.budget_share:g} of the others'"
        if arm.seed_offset:
            changes["seed"] = f"other seeds: {arm.seed_offset} is added"
        yield Arm(arm.name, arm.title or arm.name, arm.role, changes)


def _means(steps: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for metrics in steps:
        for name, value in metrics.items():
            if name.startswith(MASK_METRICS) and isinstance(value, (int, float)):
                values.setdefault(name, []).append(float(value))
    return {name: sum(some) / len(some) for name, some in values.items()}


def _launch_facts(run: PlannedRun) -> dict[str, str]:
    """Versions, machine and commit of the last launch of a run, and the hash of its text; none if it never began."""
    folder = RunFolder(run.run_folder)
    try:
        launch = strict_json.read_json(folder.environment)["launches"][-1]
        facts = {f"version of {name}": str(value) for name, value in launch["versions"].items()}
        facts |= {f"machine: {name}": str(value) for name, value in launch["hardware"].items()}
        return facts | {"commit": str(launch["commit"]), "text": str(strict_json.read_json(folder.config).get("text"))}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _text_facts(shards: Path) -> dict[str, str]:
    """How `megamask prepare` made a folder of shards: the input files with their hashes, and the settings."""
    try:
        content = strict_json.read_json(shards / manifest.NAME)
        files = [f"{each['name']} (sha256 {each['sha256']})" for each in content["inputs"]]
        settings = [f"{name}={value}" for name, value in content["settings"].items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {f"text {shards.name}": f"{', '.join(files)}; {' '.join(settings)}"}
