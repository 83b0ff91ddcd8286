"""Twenty hangs and twenty failures, each in its way and place; and a run in which nothing is wrong but slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import forked
from tests.processes.test_hangs import TIMEOUT, check_failure, check_hang

KINDS = ("stopped", "sleep", "gil", "fifo")
POINTS = {"building": 1, "data": 5, "backward": 2, "step": 3, "save": 1}
"""Where, and how manyeth time."""


@pytest.mark.parametrize("point", POINTS)
def test_hangs(apart: forked.Apart, tmp_path: Path, point: str) -> None:
    faults = [(point, number % 2, POINTS[point], kind) for number, kind in enumerate(KINDS)]
    # what comes seldom may take longer than a step; here it shall be told of soon as well
    found = apart("faults_worker:hanging", tmp_path, faults=faults, timeout=TIMEOUT, longest=60.0)
    assert len(found) == len(faults)
    for one in found:
        check_hang(one)


def test_a_collective_left_out(apart: forked.Apart, tmp_path: Path) -> None:
    (one,) = apart("faults_worker:hanging", tmp_path, faults=[("publish", 1, 1, "skip")], timeout=5.0, longest=60.0)
    check_hang(one)


@pytest.mark.parametrize("kind", ["data", "memory", "assertion", "killed"])
def test_failures(apart: forked.Apart, tmp_path: Path, kind: str) -> None:
    points = [("building", 1), ("step", 2), ("save", 1), ("evaluation", 1), ("data", 5)]
    points = [(point, nth) for point, nth in points if (kind, point) != ("data", "save")]  # which reads no data
    faults = [(point, number % 2, nth, kind) for number, (point, nth) in enumerate(points)]
    found = apart("faults_worker:failing", tmp_path, faults=faults)
    assert len(found) == len(faults)
    for one in found:
        check_failure(one)


def test_without_its_timer_the_watchdog_would_miss_a_rank_that_holds_the_interpreter(
    apart: forked.Apart, tmp_path: Path
) -> None:
    (one,) = apart("faults_worker:without_a_timer", tmp_path, timeout=TIMEOUT)
    assert one["codes"][one["rank"]] is None
    with pytest.raises(AssertionError):
        check_hang(one)


def test_what_is_slow_by_right_is_no_hang(apart: forked.Apart, tmp_path: Path) -> None:
    found = apart("faults_worker:calm", tmp_path, timeout=8.0, seconds=12.0)
    assert found["codes"] == [0, 0], found["said"]
