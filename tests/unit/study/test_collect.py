"""Results: what a log says, JSON Lines that give it back, and a study that goes on from them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megamask.data import manifest
from megamask.errors import DataError
from megamask.evaluation.cells import write_cell
from megamask.evaluation.outcome import Cell, CellKey
from megamask.storage import atomic_write, strict_json
from megamask.study.collect import collect_results, read_results, write_results
from megamask.study.jobs import CommandRecord
from megamask.study.plan import PlannedArm, StudyPlan
from megamask.study.planned_runs import PlannedRun, plan_runs
from megamask.study.study import results_problems, without_known

LOG = [
    {"step": 0, "total/tokens": 0, "flops/student": 0.0, "flops/scoring": 0.0, "total/seconds": 0.1},
    {"step": 0, "valid/loss": 9.0, "valid/accuracy": 0.0},
    {"step": 4, "mask_ratio": 0.2, "entropy/mean": 3.0},
    {"step": 4, "total/tokens": 400, "flops/student": 3e6, "flops/scoring": 1e6, "total/seconds": 5.0},
    {"step": 4, "valid/loss": 8.0, "valid/accuracy": 0.1},
    {"step": 5, "mask_ratio": 0.4, "total/tokens": 500, "flops/student": 4e6, "total/seconds": 6.0},
    {"step": 5, "valid/loss": 7.5, "valid/accuracy": 0.2},
]


@pytest.fixture
def runs(plan: StudyPlan, text: Path, tmp_path: Path) -> list[PlannedRun]:
    """The runs of the plan; the first has a log and cells."""
    runs = plan_runs(plan, tmp_path, text)
    record(runs[0], CommandRecord("finished", seconds=9.0, peak_memory=5))
    logs = runs[0].run_folder / "logs"
    logs.mkdir(parents=True)
    (logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    for mode in ("frozen", "reference"):
        write_cell(runs[0].cells(runs[0].evaluations[0]), cell(mode))
    return runs


@pytest.fixture
def copied(plan: StudyPlan, runs: list[PlannedRun], tmp_path: Path) -> Path:
    """The folder of another study, with a copy of the results alone."""
    folder = tmp_path / "other"
    folder.mkdir()
    write_results(collect_results(plan, runs, tmp_path), folder / "results.jsonl")
    return folder


def record(run: PlannedRun, pretrain: CommandRecord) -> None:
    """Write how its first command ended."""
    run.record.parent.mkdir(parents=True, exist_ok=True)
    atomic_write.write_atomic(run.record, json.dumps({"pretrain": asdict(pretrain)}))


def cell(mode: str) -> Cell:
    """A result with a score that is NaN."""
    return Cell(
        CellKey("seed-1", "sst2", mode, 0, "mean"), "ok", "", 0.5, {"accuracy": 0.5, "mcc": math.nan}, (1.0, 0.0),
        (1.0, 1.0), {"truncated": 0.0}, {"max_length": 128}, {"f": "h"}, "w", {"torch": "2"}, "megamask evaluate", 1.0,
    )  # fmt: skip


def test_the_recorded_study_is_read() -> None:
    runs, cells, references = read_results(Path(__file__).parents[3] / "docs" / "studies" / "first.jsonl")
    assert runs and references and cells and cells.keys() <= runs.keys()
    assert all(one.metrics for some in (references, *cells.values()) for one in some if one.state != "failed")


def test_a_run_is_collected_from_its_log(plan: StudyPlan, runs: list[PlannedRun], tmp_path: Path) -> None:
    results = collect_results(plan, runs, tmp_path)
    (run,) = results.runs
    assert (run.arm, run.seed, run.budget, run.state) == ("random", 1, "tokens=40960", "finished")
    assert (run.steps, run.tokens, run.seconds, run.peak_memory) == (5, 500, 6.0, 5)
    assert run.flops == {"student": 4e6, "scoring": 1e6, "teacher": 0.0}
    assert [(p.step, p.tokens, p.flops, p.loss) for p in run.curve] == [
        (0, 0, 0, 9.0),
        (4, 400, 4e6, 8.0),
        (5, 500, 5e6, 7.5),
    ]
    assert run.masks == {"mask_ratio": pytest.approx(0.3), "entropy/mean": 3.0}
    assert run.command.startswith("megamask pretrain --recipe random-tiny")


def test_a_run_says_how_its_text_was_prepared_and_where_it_ran(
    plan: StudyPlan, runs: list[PlannedRun], tmp_path: Path
) -> None:
    launches = [{"versions": {"torch": "2"}, "hardware": {"processor": "X"}, "commit": "c"}]
    for name, content in (("environment", {"launches": launches}), ("config", {"text": "abc"})):
        (runs[0].run_folder / f"{name}.json").write_text(json.dumps(content))
    (run,) = collect_results(plan, runs, tmp_path).runs
    assert run.provenance == {
        "version of torch": "2",
        "machine: processor": "X",
        "commit": "c",
        "text": "abc",
        "text shards": "wiki.txt (sha256 0f); valid_share=0.01",
    }


def test_the_manifest_of_a_text_is_read_once(
    plan: StudyPlan, runs: list[PlannedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in runs:
        record(run, CommandRecord("finished"))
    read_json, manifests = strict_json.read_json, list[Path]()

    def count_manifests(path: Path, *limits: int) -> Any:
        manifests.extend([path] if path.name == manifest.NAME else [])
        return read_json(path, *limits)

    monkeypatch.setattr(strict_json, "read_json", count_manifests)
    results = collect_results(plan, runs, tmp_path)
    assert len(results.runs) == len(runs) > 1 and len(manifests) == 1
    assert len({run.provenance["text shards"] for run in results.runs}) == 1


def test_cells_and_references_are_separated(plan: StudyPlan, runs: list[PlannedRun], tmp_path: Path) -> None:
    results = collect_results(plan, runs, tmp_path)
    ((key, (cell,)),) = results.cells.items()
    assert (key, cell.key.model) == (("random", 1, "tokens=40960"), "random/seed-1")
    assert [each.key.mode for each in results.references] == ["reference"]
    assert [arm.name for arm in results.arms] == ["random", "probe"]
    assert "masking.score" in results.arms[1].changes and "seed" not in results.arms[1].changes


def test_a_failed_run_is_a_result(plan: StudyPlan, runs: list[PlannedRun], tmp_path: Path) -> None:
    record(runs[1], CommandRecord("failed", "no space (exit code 7)", seconds=3.0))
    results = collect_results(plan, runs, tmp_path)
    assert [(run.arm, run.state, run.reason) for run in results.runs][1] == (
        "probe",
        "failed",
        "no space (exit code 7)",
    )


def test_results_are_read_as_they_were_written(plan: StudyPlan, runs: list[PlannedRun], tmp_path: Path) -> None:
    results, path = collect_results(plan, runs, tmp_path), tmp_path / "results.jsonl"
    write_results(results, path)
    assert "predictions" not in path.read_text()
    known, cells, references = read_results(path)
    assert list(known.values()) == list(results.runs)
    ((cell,),) = cells.values()
    assert math.isnan(cell.scores["mcc"]) and cell.predictions == ()
    assert cell.key == results.cells["random", 1, "tokens=40960"][0].key
    assert [each.key for each in references] == [each.key for each in results.references]


def test_a_study_continues_from_its_results_file(
    plan: StudyPlan, runs: list[PlannedRun], text: Path, tmp_path: Path, copied: Path
) -> None:
    moved, results = plan_runs(plan, copied, text), collect_results(plan, runs, tmp_path)
    assert [run.name for run in without_known(moved, copied)] == [run.name for run in runs[1:]]
    again = collect_results(plan, moved, copied)
    assert again.runs == results.runs and again.cells.keys() == results.cells.keys()
    assert {run.key for run in again.runs} <= {run.key for run in moved}
    changed = plan_runs(replace(plan, set={"masking.ratio.start": 0.3}), copied, text)
    assert len(without_known(changed, copied)) == 4


def test_a_known_run_is_repeated_for_its_pupil(plan: StudyPlan, text: Path, copied: Path) -> None:
    pupil = PlannedArm("kd", "entropy-kd-complete-tiny", teacher="random")
    with_pupil = plan_runs(replace(plan, arm=(*plan.arm, pupil)), copied, text)
    names = [run.name for run in without_known(with_pupil, copied)]
    assert names == [run.name for run in with_pupil] and "random/tokens=40960/seed-1" in names
    alone = [run for run in with_pupil if run.arm.name == "random"]
    assert "random/tokens=40960/seed-1" not in [run.name for run in without_known(alone, copied)]


def test_results_that_the_plan_would_not_keep_are_named(plan: StudyPlan, text: Path, copied: Path) -> None:
    assert results_problems(plan_runs(plan, copied, text), copied) == []
    changed = plan_runs(replace(plan, set={"masking.ratio.start": 0.3}), copied, text)
    (problem,) = results_problems(changed, copied)
    assert "other settings" in problem and "the run random/tokens=40960/seed-1" in problem
    record(changed[0], CommandRecord("stopped"))  # its command compares them
    assert results_problems(changed, copied) == []
    (problem,) = results_problems(changed[1:], copied)
    assert "not in the plan: the run random/tokens=40960/seed-1" in problem


def test_a_result_keeps_the_settings_that_it_was_made_with(
    plan: StudyPlan, runs: list[PlannedRun], text: Path, tmp_path: Path
) -> None:
    record(runs[0], CommandRecord("finished", settings=runs[0].settings))
    changed = plan_runs(replace(plan, set={"masking.ratio.start": 0.3}), tmp_path, text)
    assert collect_results(plan, changed, tmp_path).runs[0].settings == runs[0].settings != changed[0].settings


def test_all_damaged_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"kind": "study"}\n{"kind": "run", "arm": 3}\n\n{"kind": "cell"}\n\xff\n[]\n{"kind": "cel')
    with pytest.raises(DataError) as error:
        read_results(path)
    places = [f"{path}, line {number}, is damaged" in str(error.value) for number in range(1, 8)]
    assert places == [False, True, False, True, True, True, True]


def test_a_folder_in_place_of_the_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a file, but is a folder"):
        read_results(tmp_path)


def test_the_results_of_an_evaluation_are_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": {"task": "sst2"}}\n' * 2)
    with pytest.raises(DataError) as error:
        read_results(path)
    (problem,) = error.value.problems
    assert "has results of `megamask evaluate`, not of a study" in problem and "--output" in problem


def test_a_line_that_is_there_twice_counts_once_and_two_results_of_a_run_are_refused(
    plan: StudyPlan, runs: list[PlannedRun], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    write_results(collect_results(plan, runs, tmp_path), path)
    once = read_results(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, *lines]))
    assert read_results(path) == once
    (line,) = (line for line in lines if '"kind": "run"' in line)
    path.write_text("\n".join([*lines, line.replace('"finished"', '"failed"')]))
    with pytest.raises(DataError, match=f"line {len(lines) + 1}, .* line {lines.index(line) + 1}"):
        read_results(path)
