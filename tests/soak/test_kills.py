"""Kills by the thousand: at any moment, of any rank, and nothing that was acknowledged is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import test_publish
from tests.system import test_kills


@pytest.mark.parametrize("variant", ["sound", "background"])
def test_ten_thousand_kills_of_the_publisher(apart, tmp_path: Path, variant: str) -> None:
    test_publish.test_no_kill_costs_a_checkpoint(apart, tmp_path, variant, kills=10_000)


def test_a_hundred_launches_that_wake_too_late(apart, tmp_path: Path) -> None:
    test_publish.test_a_launch_that_lost_its_lock_publishes_nothing(apart, tmp_path, rounds=100)


def test_two_hundred_saves_where_storage_lags(apart, tmp_path: Path) -> None:
    test_publish.test_a_file_system_that_lags_costs_no_save(apart, tmp_path, "sound", True, saves=200)


@pytest.mark.parametrize("variant", ["sound", "background"])
def test_two_hundred_kills_of_trainings_of_two_ranks(apart, data: Path, tmp_path: Path, variant: str) -> None:
    arguments = {"kills": 200, "stages": [0, 1, 2, 3], "world": 2}
    test_kills.test_kills_of_a_training_cost_nothing(apart, data, tmp_path, variant, **arguments)


def test_the_kills_find_a_training_that_forgets_its_moments(apart, data: Path, tmp_path: Path) -> None:
    test_kills.test_the_kills_find_a_training_that_saves_in_place(apart, data, tmp_path, variant="forgetful")
