"""Long versions of tests: hours instead of seconds, run by `make soak` alone.

What they check stands in functions that take a count, next to the short version that `make test` runs.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.processes.conftest import run_ranks  # noqa: F401
from tests.system.conftest import copy, data, finished, folder, tagged  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # of the whole session, not only of this folder
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.soak)
            if os.environ.get("MEGAMASK_SOAK") != "1":
                item.add_marker(pytest.mark.skip(reason="takes hours; `make soak` runs it"))
