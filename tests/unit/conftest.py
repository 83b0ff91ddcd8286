"""What several unit tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.batch import TokenIds
from megamask.checkpoint.run_folder import RunFolder
from megamask.data import tokenizer as tokenizers
from megamask.data import tokenizer_training

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs and some water."]
"""What the small tokenizer knows."""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """An empty run folder, held by the launch that it names."""
    run = RunFolder(tmp_path / "run", "launch")
    run.checkpoints.mkdir(parents=True)
    run.lock.write_text('{"launch": "launch"}')
    return run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer of a few English words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_training.train_tokenizer("wordpiece", TEXTS * 5, size=90).save(folder)
    return folder


@pytest.fixture(scope="module")
def ids(tokenizer: Path) -> TokenIds:
    """Its special tokens."""
    return tokenizers.token_ids(tokenizers.load_tokenizer(tokenizer))
