"""Signals to stop at any point of a run: all ranks end after the same step, and the next launch goes on exactly."""

from __future__ import annotations

from pathlib import Path

from tests.processes import forked


def test_a_run_stopped_by_a_signal_resumes_exactly(apart: forked.Apart, tmp_path: Path) -> None:
    check(apart("faults_worker:signals", tmp_path, count=6, seed=0), 6)


def test_a_run_that_writes_in_the_background_finishes_what_it_writes(apart: forked.Apart, tmp_path: Path) -> None:
    """The signal arrives while a rank writes: the run publishes that checkpoint, and the one of a later last step."""
    how = {"points_first": ["save", "save", "backward"], "checkpoint__background": True}
    report = apart("faults_worker:signals", tmp_path, count=3, seed=0, **how)
    check(report | {"second saves": 0}, 3)  # whether a step came in between depends on when the signal arrived


def check(report: dict, count: int) -> None:
    """Every signal led to a checkpoint and exit code 75, the end came as usual, and nothing shows in the weights."""
    slowest = max(report["seconds"])
    print(f"\n{count} signals: {report['points']}, {report['codes']}; slowest {slowest:.1f} s")
    assert report["codes"] == {
        "[75, 75]": count,
        "save at the end: [0, 0]": 1,
        "export at the end: [0, 0]": 1,
    }
    assert report["second saves"] == report["lost saves"] == 0
    assert report["leftovers"] == []
    assert report["same"]
