"""A real Slurm, started once for the session and cleaned after each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import NoReturn

import pytest

from tests.slurm.cluster import Cluster, why_not
from tests.system.conftest import data, folder  # noqa: F401


def do_without(reason: str) -> NoReturn:
    """Skip; or fail where Slurm must be there, for a skip would hide that it is not."""
    if os.environ.get("MEGAMASK_REQUIRE_SLURM") == "1":
        pytest.fail(f"no Slurm: {reason}", pytrace=False)
    pytest.skip(f"no Slurm: {reason}")


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Four nodes: two to train on, a spare one, and one for each that is lost."""
    if reason := why_not():
        do_without(reason)
    with Cluster(nodes=4) as started:
        yield started
    if request.session.testsfailed:
        print(f"\nlogs of the cluster: {started.dir}")
    else:
        shutil.rmtree(started.dir)


@pytest.fixture
def slurm(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, idle before and after."""
    yield cluster
    cluster.clean()
