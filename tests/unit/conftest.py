"""What several unit tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.checkpoint import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """An empty run folder, held by the launch that it names."""
    run = RunFolder(tmp_path / "run", "launch")
    run.checkpoints.mkdir(parents=True)
    run.lock.write_text('{"launch": "launch"}')
    return run
