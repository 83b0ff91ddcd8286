"""One made-up text, its shards and one finished run, shared by the tests of whole commands."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from megamask.data.shard_writer import write_sidecar
from megamask.data.shards import SPLITS, Shards
from tests.system.commands import shell, text, train

STEPS = 12


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("system")


@pytest.fixture(scope="session")
def data(folder: Path) -> Path:
    """Shards as megamask prepare makes them."""
    source, output = folder / "corpus.txt", folder / "data"
    source.write_text(text(documents=200))
    more = ["--tokenizer", "wordpiece", "--vocab-size", "300", "--valid-share", "0.2", "--workers", "1"]
    made = shell(sys.executable, "-m", "megamask", "prepare", "--input", source, "--output", output, *more)
    assert made.code == 0, made.err
    assert "200 documents read (0 bad" in made.out
    return output


@pytest.fixture(scope="session")
def finished(folder: Path, data: Path) -> Path:
    """A run that nothing disturbed."""
    output = folder / "finished"
    ended = train(data, output, steps=STEPS, checkpoint__every=4, validation__every=4)
    assert ended.code == 0, ended.err
    return output


@pytest.fixture(scope="session")
def tagged(folder: Path, data: Path) -> Path:
    """The shards with tags beside them: some, for there is no grammar in made-up words."""
    output = Path(shutil.copytree(data, folder / "tagged"))
    for split in SPLITS:
        tags = [(part % 4).astype(np.uint8) for part in Shards.open(output, split).parts]
        write_sidecar(output, "tags", split, tags, {"tags": ["NOUN", "VERB", "ADJ"]})
    return output


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))
