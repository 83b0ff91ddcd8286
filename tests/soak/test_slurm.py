"""A run on a real Slurm that hardly takes five steps in peace."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import cluster, slurm  # noqa: F401
from tests.slurm.jobs import losses
from tests.slurm.story import DEEDS, Story


@pytest.mark.slurm
@pytest.mark.parametrize("count", [20])
def test_a_run_through_many_deeds(slurm: Cluster, data: Path, tmp_path: Path, count: int) -> None:  # noqa: F811
    deeds = ([*DEEDS, "outage"] * count)[:count]
    random.shuffle(deeds)
    story = Story(slurm, data, tmp_path, deeds)
    story.happens()
    here, there = losses(story.job.run), losses(story.twin.run)
    different = sum(own != other for own, other in zip(here, there, strict=True))
    restarts = [int(slurm.job(link.number)["Restarts"]) for link in story.links]
    print(f"\n{dict(Counter(deeds))}: {len(restarts)} jobs with {sum(restarts)} restarts")
    print(f"figures compared: {len(there)}, different: {different}")
    assert not different
