"""Signals to stop at any point of a run: all ranks end after the same step, and the next launch goes on exactly."""

from __future__ import annotations

from pathlib import Path

from tests.processes import forked


def test_a_run_that_is_asked_to_stop_goes_on_exactly(apart: forked.Apart, tmp_path: Path) -> None:
    check(apart("faults_worker:signals", tmp_path, count=6, seed=0), 6)


def check(found: dict, count: int) -> None:
    """Every signal led to a checkpoint and exit code 75, the end came as usual, and nothing shows in the weights."""
    slowest = max(found["seconds"])
    print(f"\n{count} signals: {found['points']}, {found['codes']}; slowest {slowest:.1f} s")
    assert found["codes"] == {
        "[75, 75]": count,
        "save at the end: [0, 0]": 1,
        "export at the end: [0, 0]": 1,
    }
    assert found["second saves"] == 0
    assert found["leftovers"] == []
    assert found["same"]
