"""A job on a real Slurm that hardly takes ten steps in peace."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import cluster, slurm  # noqa: F401
from tests.slurm.jobs import losses
from tests.slurm.test_training import alone, disturbed, steps_for

DEEDS = ["limit", "signal", "preemption", "failure", "crash"]


@pytest.mark.slurm
def test_a_job_through_many_deeds(slurm: Cluster, data: Path, tmp_path: Path) -> None:  # noqa: F811
    deeds = DEEDS * 4
    random.shuffle(deeds)
    (tmp_path / "alone").mkdir()
    undisturbed = alone(slurm, data, tmp_path / "alone", steps_for(deeds))
    job = disturbed(slurm, data, tmp_path / "disturbed", deeds)
    here, there = losses(job.run), losses(undisturbed.run)
    different = sum(mine != theirs for mine, theirs in zip(here, there, strict=True))
    print(f"\nrestarts: {slurm.job(job.number)['Restarts']}, {dict(Counter(deeds))}")
    print(f"figures compared: {len(there)}, different: {different}")
    assert not different
