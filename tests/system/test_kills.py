"""A training that is killed, in whatever phase, goes on by the same command and comes to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize("variant", ["sound", "background"])
def test_kills_of_a_training_cost_nothing(apart, data: Path, tmp_path: Path, variant: str, **more: object) -> None:
    arguments = {"data": str(data), "kills": 10, "stages": [1], "world": 1, "seed": 0} | more
    report = apart("kill_worker:training_kills", tmp_path, variant=variant, **arguments)
    print(f"\nkills of a training: {report}")
    assert report["lost"] == []
    assert report["kills"] == arguments["kills"]
    assert report["differ"] == 0
    assert report["inside a save"] >= 0.4 * report["kills"] or report["kills"] < 100


def test_the_kills_find_a_training_that_saves_in_place(apart, data: Path, tmp_path: Path, **more: object) -> None:
    arguments = {"data": str(data), "kills": 20, "stages": [1], "world": 1, "seed": 1, "variant": "in place"} | more
    report = apart("kill_worker:training_kills", tmp_path, **arguments)
    assert report["lost"] or report["differ"]
