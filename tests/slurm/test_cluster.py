"""The cluster itself: gone with the Python that started it, and never left out in silence."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import cluster as started
from tests.slurm.cluster import why_not
from tests.slurm.conftest import do_without
from tests.slurm.jobs import ROOT

pytestmark = pytest.mark.slurm


def processes(words: str) -> list[str]:
    """The command lines with ``words`` in them."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            pids.append(path.read_text(errors="replace").replace("\0", " "))
    return [line for line in pids if words in line]


def test_a_killed_python_leaves_no_cluster_behind() -> None:
    if reason := why_not():
        do_without(reason)
    command = [sys.executable, "-m", "tests.slurm.cluster", "--nodes", "2", "--", "sleep", "300"]
    python = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert python.stderr
    line = python.stderr.readline()
    assert "2 nodes are up" in line
    folder = line.split()[-1]
    assert processes(folder)  # munged, at least, is told where it is
    python.kill()
    python.wait()
    end = time.monotonic() + 60
    while left := processes(folder):
        assert time.monotonic() < end, left
        time.sleep(0.1)
    shutil.rmtree(folder)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(started, "PATH", "/nowhere")
    assert "not installed: munged, mungekey, slurmctld" in why_not()
    assert "apt-get install" in why_not()


def test_slurm_is_skipped_unless_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAMASK_REQUIRE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Slurm: a reason"):
        do_without("a reason")
    monkeypatch.setenv("MEGAMASK_REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="no Slurm: a reason"):
        do_without("a reason")
