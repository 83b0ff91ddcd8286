"""The folder of a study: another plan is refused with the difference, additions are allowed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megamask.errors import ConfigError, DataError, StorageError
from megamask.study.plan import PlannedArm, StudyPlan
from megamask.study.study import task_problems
from megamask.study.study_folder import open_study
from tests.unit.evaluation.files import LINES, write_lines


def test_the_same_plan_may_continue_and_grow(plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    assert open_study(tmp_path, plan, text) == []
    larger = replace(plan, seeds=(3, 1, 2), arm=(*plan.arm, PlannedArm("new", "mrd-cosine-tiny")), question="other")
    additions = open_study(tmp_path, larger, text)
    assert any("seeds 3" in line for line in additions)
    assert any("arm new" in line for line in additions)


def test_every_difference_from_the_plan_of_the_folder_is_named(plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    open_study(tmp_path, plan, text)
    other = replace(
        plan,
        seeds=(1,),
        arm=(plan.arm[0], replace(plan.arm[1], set={"masking.ratio.start": 0.4})),
        evaluation=({"name": "frozen", "frozen": False, "tasks": ["sst2"]},),
    )
    with pytest.raises(ConfigError) as error:
        open_study(tmp_path, other, text)
    text_of = str(error.value)
    for word in ("seeds 2", "arm probe.set", "evaluation frozen.frozen", "another plan"):
        assert word in text_of


def test_another_text_is_refused(plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    open_study(tmp_path, plan, text)
    record = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(record.replace('"text_hash": "', '"text_hash": "0'))
    with pytest.raises(ConfigError, match="text_hash"):
        open_study(tmp_path, plan, text)


@pytest.mark.parametrize("content", ["{", "{}", '{"arm": 3, "seeds": [1], "budgets": []}', "[]"])
def test_a_damaged_plan_is_named_with_the_cure(content: str, plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(DataError, match=r"plan\.json .* If the plan is the one of this study, delete the file"):
        open_study(tmp_path, plan, text)
    assert (tmp_path / "plan.json").read_text() == content


def test_an_output_that_cannot_be_a_folder_is_named(plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written: Not a directory"):
        open_study(tmp_path / "file" / "study", plan, text)


def test_tasks_without_files_are_named_before_any_run(plan: StudyPlan, tmp_path: Path) -> None:
    (problem,) = task_problems(plan, str(tmp_path / "gone"))
    assert "`tasks_data` must be a folder" in problem
    (problem,) = task_problems(plan, str(tmp_path))[1:]
    assert problem.startswith("sst2: put ")
    pairs = replace(plan, evaluation=({"name": "blimp", "tasks": ["blimp"]},))
    (problem,) = task_problems(pairs, "")
    assert "blimp" in problem and "Set `tasks_data`" in problem
    write_lines(tmp_path / "sst2.jsonl", LINES)
    assert task_problems(plan, str(tmp_path)) == task_problems(replace(plan, evaluation=()), "") == []


def test_a_comparison_alone_writes_nothing(plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    assert open_study(tmp_path / "study", plan, text, write=False) == []
    assert not (tmp_path / "study").exists()
    open_study(tmp_path, plan, text)
    with pytest.raises(ConfigError, match="another plan"):
        open_study(tmp_path, replace(plan, seeds=(1,)), text, write=False)
