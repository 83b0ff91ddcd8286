"""Twenty hangs and twenty failures of different kinds at different points; and a run that is only slow."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from tests.processes import forked
from tests.processes.faults import Fault, Result
from tests.processes.test_hangs import TIMEOUT, check_failure, check_hang

KINDS = ("stopped", "sleep", "gil", "fifo")
NTH = {"building": 1, "data": 5, "backward": 2, "step": 3, "save": 1}
"""Points, and the call that hangs there."""


def run(apart: forked.Apart, folder: Path, function: str, faults: list[Fault], **more: float) -> list[Result]:
    answers = apart(f"faults_worker:{function}", folder, faults=[asdict(fault) for fault in faults], **more)
    assert [answer["fault"] for answer in answers] == [asdict(fault) for fault in faults]
    return [Result.from_json(answer) for answer in answers]


@pytest.mark.parametrize("point", NTH)
def test_hangs(apart: forked.Apart, tmp_path: Path, point: str) -> None:
    faults = [Fault(point, number % 2, NTH[point], kind, waits=False) for number, kind in enumerate(KINDS)]
    # rare phases may take longer than a step; here they should time out soon as well
    for result in run(apart, tmp_path, "hanging", faults, timeout=TIMEOUT, rare_timeout=60.0):
        check_hang(result)


def test_a_skipped_collective(apart: forked.Apart, tmp_path: Path) -> None:
    fault = Fault("publish", kind="skip", waits=False)
    (result,) = run(apart, tmp_path, "hanging", [fault], timeout=TIMEOUT, rare_timeout=60.0)
    check_hang(result)


@pytest.mark.parametrize("kind", ["data", "memory", "assertion", "killed"])
def test_failures(apart: forked.Apart, tmp_path: Path, kind: str) -> None:
    points = {"building": 1, "step": 2, "save": 1, "evaluation": 1, "data": 5}
    if kind == "data":
        del points["save"]  # which reads no data
    faults = [Fault(point, n % 2, nth, kind, waits=False) for n, (point, nth) in enumerate(points.items())]
    for result in run(apart, tmp_path, "failing", faults):
        check_failure(result)


def test_without_its_timer_the_watchdog_misses_a_rank_that_blocks_python(apart: forked.Apart, tmp_path: Path) -> None:
    fault = asdict(Fault("backward", 1, 2, "gil", waits=False))
    (answer,) = apart("faults_worker:without_a_timer", tmp_path, fault=fault, timeout=TIMEOUT)
    result = Result.from_json(answer)
    assert result.codes[result.fault.rank] is None
    with pytest.raises(AssertionError):
        check_hang(result)


def test_slow_rare_phases_are_not_a_hang(apart: forked.Apart, tmp_path: Path) -> None:
    answer = apart("faults_worker:slow_phases", tmp_path, timeout=8.0, seconds=12.0)
    assert answer["codes"] == [0, 0], answer["printed"]
