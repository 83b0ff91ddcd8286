"""A training that is killed, in whatever phase, goes on by the same command and comes to the same weights."""

from __future__ import annotations

from pathlib import Path


def test_kills_of_a_training_cost_nothing(apart, data: Path, tmp_path: Path, **more: object) -> None:
    asked = {"data": str(data), "kills": 10, "stages": [1], "world": 1, "seed": 0} | more
    found = apart("kill_worker:training_kills", tmp_path, variant="sound", **asked)
    print(f"\nkills of a training: {found}")
    assert found["lost"] == []
    assert found["kills"] == asked["kills"]
    assert found["differ"] == 0
    assert found["inside a save"] >= 0.4 * found["kills"] or found["kills"] < 100


def test_the_kills_find_a_training_that_saves_in_place(apart, data: Path, tmp_path: Path, **more: object) -> None:
    asked = {"data": str(data), "kills": 20, "stages": [1], "world": 1, "seed": 1, "variant": "in place"} | more
    found = apart("kill_worker:training_kills", tmp_path, **asked)
    assert found["lost"] or found["differ"]
