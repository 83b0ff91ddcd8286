"""Flags of `megamask study` that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.errors.setting_rules import settings_problems
from megamask.study.settings import StudyConfig


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_folder_of_a_study_is_not_a_file(tmp_path: Path, dry_run: bool) -> None:
    file = tmp_path / "file"
    file.touch()
    (problem,) = settings_problems(StudyConfig(plan="first", output=file, dry_run=dry_run))
    assert "`output` must be a folder" in problem and str(file) in problem
    assert settings_problems(StudyConfig(plan="first", output=tmp_path, dry_run=dry_run)) == []
    (below,) = settings_problems(StudyConfig(plan="first", output=file / "study", dry_run=dry_run))
    assert below == problem
