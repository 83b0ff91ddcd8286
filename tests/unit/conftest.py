"""What several unit tests begin with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megamask.batch import TokenIds
from megamask.checkpoint.run_folder import RunFolder
from megamask.data import tokenizer as tokenizers
from megamask.data import tokenizer_training
from megamask.data.shard_writer import EncodedDocuments, write_shards

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


@pytest.fixture(scope="module")
def text(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the shards of a small text."""
    folder = tmp_path_factory.mktemp("text") / "shards"
    folder.mkdir()
    draws = np.random.default_rng(0)

    def documents(lengths: list[int]) -> list[EncodedDocuments]:
        return [EncodedDocuments(draws.integers(10, 80, sum(lengths)), np.array(lengths, np.int64))]

    splits = {"train": documents([40, 100, 300, 20, 150] * 8), "valid": documents([400, 300])}
    write_shards(folder, tokenizers.load_tokenizer(tokenizer), splits, facts={})
    return folder
