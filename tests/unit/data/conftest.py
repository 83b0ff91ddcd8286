"""Small shards for tests: a WordPiece tokenizer with a word for each id, and documents of given lengths."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from megamask.data import shards
from megamask.data.shard_writer import SHARD_TOKENS, EncodedDocuments, write_shards
from megamask.data.tokenizer import SPECIAL, Tokenizer

ROLES = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))


def _tokenizer(size: int = 300) -> Tokenizer:
    """Ids 0 to 4 are special; of the others each third is the continuation of a word."""
    words = [f"##w{n}" if n % 3 == 0 else f"w{n}" for n in range(len(SPECIAL), size)]
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, ROLES)


@pytest.fixture
def tiny_tokenizer() -> Tokenizer:
    return _tokenizer()


@pytest.fixture
def make_shards(tmp_path):
    """Shards of documents with the given lengths, of random ids that are not special, in ``tmp_path/name``."""

    def make(
        lengths,
        *,
        name: str = "shards",
        shard_tokens: int = SHARD_TOKENS,
        valid=(20, 30),
        units: int = 5,
        vocabulary=300,
    ):
        folder: Path = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)

        def cut(lengths):
            for some in np.array_split(np.array(lengths, np.int64), units):
                yield EncodedDocuments(rng.integers(len(SPECIAL), vocabulary, some.sum()), some)

        splits = {"train": cut(lengths), "valid": cut(valid)}
        write_shards(folder, _tokenizer(vocabulary), splits, facts={}, shard_tokens=shard_tokens)
        return folder

    return make


@pytest.fixture
def documents_of():
    """The documents of shards as lists of ids, by the plainest code."""

    def read(opened: shards.Shards) -> list[list[int]]:
        documents = []
        for name in opened.names:
            tokens = np.load(opened.folder / f"{name}.tokens.npy")
            offsets = np.load(opened.folder / f"{name}.offsets.npy")
            documents += [tokens[a:b].tolist() for a, b in pairwise(offsets)]
        return documents

    return read
