"""A small text for planned runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megamask.data.shard_writer import EncodedDocuments, write_shards
from megamask.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def text(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its shards."""
    folder = tmp_path_factory.mktemp("text") / "shards"
    folder.mkdir()
    draws = np.random.default_rng(0)

    def documents(lengths: list[int]) -> list[EncodedDocuments]:
        return [EncodedDocuments(draws.integers(10, 80, sum(lengths)), np.array(lengths, np.int64))]

    splits = {"train": documents([40, 100, 300, 20, 150] * 8), "valid": documents([400, 300])}
    write_shards(folder, load_tokenizer(tokenizer), splits, facts={})
    return folder
