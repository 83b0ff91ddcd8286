"""A rank that is slow in a real run is named, though all ranks end each step together."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(("whole_steps", "named"), [(False, 1), (True, 0)])
def test_a_slow_rank_is_detected_by_its_own_work_not_by_step_times(
    apart, tmp_path: Path, whole_steps: bool, named: int
) -> None:
    lines, silent = apart("faults_worker:slow_ranks", tmp_path, whole_steps=whole_steps)
    assert lines.count(" is slow: its own work takes ") == named
    assert lines.count("Rank 1 on ") == named
    assert " is slow" not in silent
