"""What holds for every test: no network, nothing written outside temporary folders, shapes checked, seeds set."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Libraries read these when they are imported, so they come before any import; processes that tests start inherit them,
# pytest's own workers among them, so that what one has built is there for all.
if "PYTEST_XDIST_WORKER" not in os.environ:
    SCRATCH = tempfile.TemporaryDirectory(prefix="megamask-tests-")  # removed when Python ends
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": f"{SCRATCH.name}/huggingface",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(ROOT / ".cache" / "hypothesis"),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # a build that was killed leaves a lock on which every later one would wait
        "TORCH_EXTENSIONS_DIR": f"{SCRATCH.name}/torch_extensions",
    }
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each rank would compile megamask again

# Every call into megamask checks the shapes and types it was given. MEGAMASK_CHECK_SHAPES=0 leaves that out.
if os.environ.get("MEGAMASK_CHECK_SHAPES", "1") != "0":
    import jaxtyping

    # the tower: where a float is asked for, an int will do, as everywhere in Python
    checker = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    jaxtyping.install_import_hook("megamask", checker)

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.processes import forked
from tests.processes.server import Server

torch.set_num_threads(1)

# No time limits, since a busy machine is not a bug; in CI the same examples each time.
settings.register_profile("megamask", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("megamask")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Forks processes for all tests that need some."""
    started = Server()
    yield started
    started.close()


@pytest.fixture(scope="session")
def apart(server: Server) -> forked.Apart:
    """``apart("module:function", folder, **given)``: what a function returns that worked in a process of its own."""
    return partial(forked.apart, server)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Each test draws the same numbers, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
