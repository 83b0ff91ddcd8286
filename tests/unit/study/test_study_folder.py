"""The folder of a study: another plan is refused with the difference, additions are allowed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megamask.errors import ConfigError
from megamask.study.plan import PlannedArm, StudyPlan
from megamask.study.study_folder import open_study


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
