"""Disks that are full, by fifty degrees, and a training that meets one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import test_publish

pytestmark = test_publish.namespace


def test_fifty_degrees_of_a_full_disk(apart, tmp_path: Path) -> None:
    test_publish.test_a_full_disk_costs_no_checkpoint(apart, tmp_path, levels=50)


@pytest.mark.parametrize(
    ("stage", "background"), [(0, False), (1, True), (1, False), (2, False), (3, False), (3, True)]
)
def test_a_training_survives_one_full_disk_and_gives_up_on_three(
    apart, data: Path, tmp_path: Path, stage: int, background: bool
) -> None:
    how = {"data": str(data), "world": 2, "stage": stage, "background": background}
    report = apart("kill_worker:training_on_a_full_disk", tmp_path, **how)
    print(f"\na training on a full disk: {report['ends']}")
    assert report["ends"] == [[7, 7], [1, 3], [0, 0], [4, 5, 6]], report["log"]
    assert report["same"]
    assert "could not save checkpoint 2: No space left on device" in report["log"]
    assert "Training continues; the next checkpoint is tried as usual." in report["log"]
