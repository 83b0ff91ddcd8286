"""Word boundaries: for every type of tokenizer the words that a reader sees, or those of the pre-tokenizer."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Regex, models, normalizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from megamask.data import local_text
from megamask.data.packs import Packs
from megamask.data.shard_writer import EncodedDocuments, write_shards
from megamask.data.shards import Shards
from megamask.data.tokenizer import ROLES, SPECIAL, Tokenizer, load_tokenizer, switch_off
from megamask.data.word_boundaries import WordLengths, encode_with_word_starts, word_rule
from megamask.errors import ConfigError, DataError
from tests.batches import text_positions

UNKNOWN_INSIDE = "old☂man ☂old man☂ nets"
TEXT = "The old fisherman mended his nets before the storm came, and nobody helped."
SPLIT = pre.Split(Regex(r"\s?\p{L}+|\s?\p{N}+|\s?[^\s\p{L}\p{N}]+|\s+"), "isolated")
BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(local_text.collect_local_text(60_000))


def trained(texts, model, trainer, pre_tokenizer=None, normalizer=None, **options) -> Tokenizer:
    backend = Backend(model)
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    options |= {"vocab_size": 500, "special_tokens": list(SPECIAL), "show_progress": False}
    backend.train_from_iterator(texts, trainer(**options))
    return Tokenizer(backend, dict(zip(ROLES, SPECIAL, strict=True)))


def bpe(texts, pre_tokenizer=None, normalizer=None, **how) -> Tokenizer:
    return trained(texts, models.BPE(unk_token="[UNK]", **how), trainers.BpeTrainer, pre_tokenizer, normalizer, **how)


def unigram(texts, pre_tokenizer) -> Tokenizer:
    return trained(texts, models.Unigram(), trainers.UnigramTrainer, pre_tokenizer, unk_token="[UNK]")


def wordpiece(texts, prefix: str) -> Tokenizer:
    how = {"continuing_subword_prefix": prefix}
    model = models.WordPiece(unk_token="[UNK]", **how)
    return trained(texts, model, trainers.WordPieceTrainer, pre.Whitespace(), **how)


BY_MARKS = {
    "wordpiece": lambda texts: wordpiece(texts, "##"),
    "unigram metaspace": lambda texts: unigram(texts, pre.Metaspace()),
    "metaspace after whitespace": lambda texts: unigram(texts, pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()])),
}
BY_PRE_TOKENIZER = {
    "bpe ##": lambda texts: bpe(texts, pre.Whitespace(), continuing_subword_prefix="##"),
    "byte-level": lambda texts: bpe(texts, pre.ByteLevel(add_prefix_space=False)),
    "byte-level after split": lambda texts: bpe(texts, pre.Sequence([SPLIT, BYTES])),
    "bpe whitespace": lambda texts: bpe(texts, pre.Whitespace()),
    "bpe bert": lambda texts: bpe(texts, pre.BertPreTokenizer(), normalizers.BertNormalizer()),
    "bpe </w>": lambda texts: bpe(texts, pre.Whitespace(), end_of_word_suffix="</w>"),
    "byte-level after whitespace": lambda texts: bpe(texts, pre.Sequence([pre.Whitespace(), BYTES])),
    "wordlevel": lambda texts: trained(
        texts, models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer, pre.Whitespace()
    ),
    "unigram whitespace": lambda texts: unigram(texts, pre.Whitespace()),
    "wordpiece without ##": lambda texts: wordpiece(texts, ""),
}
# with these, a comma belongs to the word before it
BY_SPACES = {
    "metaspace at the first word alone": lambda texts: unigram(
        texts, pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace(prepend_scheme="first")])
    ),
    "another mark": lambda texts: bpe(texts, pre.Metaspace(replacement="_")),
    "split, removed": lambda texts: bpe(texts, pre.Split(" ", "removed")),
    "split, space behind": lambda texts: bpe(texts, pre.Split(" ", "merged_with_previous")),
}
UNKNOWN = {
    "no pre-tokenizer": lambda texts: bpe(texts),
    "spaces marked, words not apart": lambda texts: bpe(texts, pre.Metaspace(split=False)),
    "bytes, words not apart": lambda texts: bpe(texts, BYTES),
}


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words as pieces of ``text``, by the offsets of their tokens."""
    [(ids, starts)] = encode_with_word_starts(tokenizer, [text])
    [(same, places)] = tokenizer.encode_with_offsets([text])
    assert ids.tolist() == same.tolist() and starts[0]
    bounds = [*np.flatnonzero(starts), len(ids)]
    return [text[places[begin][0] : places[end - 1][1]].strip() for begin, end in pairwise(bounds)]


def starts_of(tokenizer: Tokenizer, text: str) -> list[bool]:
    [(_, starts)] = encode_with_word_starts(tokenizer, [text])
    return starts.tolist()


def starts_of_transformers(tokenizer: Tokenizer, text: str) -> list[bool]:
    encoding = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)(text, add_special_tokens=False)
    numbers = encoding.word_ids()
    return [number != before for number, before in zip(numbers, [None, *numbers], strict=False)]


@pytest.mark.parametrize("kind", [*BY_MARKS, *BY_PRE_TOKENIZER])
def test_words_are_those_that_a_reader_sees(texts, kind):
    tokenizer = (BY_MARKS | BY_PRE_TOKENIZER)[kind](texts)
    assert word_rule(tokenizer) == ("marks" if kind in BY_MARKS else "pre_tokenizer")
    assert words_of(tokenizer, TEXT) == re.findall(r"\w+|[^\w\s]+", TEXT)


@pytest.mark.parametrize("kind", [*BY_MARKS, *BY_PRE_TOKENIZER, *BY_SPACES])
def test_an_added_token_is_a_word_of_its_own(texts, kind):
    tokenizer = (BY_MARKS | BY_PRE_TOKENIZER | BY_SPACES)[kind](texts)
    tokenizer.backend.add_tokens(["zzyzx"])
    assert words_of(tokenizer, "oldzzyzxman") == ["old", "zzyzx", "man"]


@pytest.mark.parametrize("kind", BY_MARKS)
def test_an_unknown_token_inside_a_word_continues_it_as_in_transformers(texts, kind):
    """Other kinds are compared below. Metaspace: words end at punctuation too, which this text does not have."""
    tokenizer = BY_MARKS[kind](texts)
    assert starts_of_transformers(tokenizer, UNKNOWN_INSIDE) == starts_of(tokenizer, UNKNOWN_INSIDE)


@pytest.mark.parametrize("kind", BY_SPACES)
def test_words_between_spaces(texts, kind):
    tokenizer = BY_SPACES[kind](texts)
    assert word_rule(tokenizer) == "pre_tokenizer" and words_of(tokenizer, TEXT) == TEXT.split()


@pytest.mark.parametrize("kind", [*BY_PRE_TOKENIZER, *BY_SPACES])
def test_words_of_the_pre_tokenizer_are_those_of_transformers(texts, kind):
    """On real text, with Chinese characters, unknown words, and letters behind punctuation."""
    tokenizer = (BY_PRE_TOKENIZER | BY_SPACES)[kind](texts)
    for text in [*texts[:20], "東京 and ☂☂ or 北京大学, zzz.", UNKNOWN_INSIDE, 'the (old) man\'s "nets" 12abc']:
        assert starts_of(tokenizer, text) == starts_of_transformers(tokenizer, text)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_tokenizer_without_word_boundaries_is_refused(texts, kind, tmp_path):
    tokenizer = UNKNOWN[kind](texts)
    with pytest.raises(ConfigError, match="does not show where words begin"):
        encode_with_word_starts(tokenizer, [TEXT])
    [ids] = tokenizer.encode([TEXT])
    write_shards(tmp_path, tokenizer, {"train": [EncodedDocuments(ids, np.array([len(ids)]))]}, facts={})
    with pytest.raises(DataError, match=rf"tokenizer of {tmp_path} does not show .* `masking\.unit` to token"):
        Shards.open(tmp_path).check_words()


# ---- beside the shards


@pytest.fixture
def folder(texts, tmp_path):
    tokenizer = BY_PRE_TOKENIZER["bpe whitespace"](texts)
    encoded = encode_with_word_starts(tokenizer, [*texts, UNKNOWN_INSIDE * 100])
    units = [EncodedDocuments(ids, np.array([len(ids)]), starts) for ids, starts in encoded]
    write_shards(tmp_path, tokenizer, {"train": units}, facts={}, shard_tokens=3000)
    return tmp_path


def test_packs_have_the_words_of_the_text(folder, texts):
    """Tokens of a pack begin words where the text does, across the ends of shards."""
    shards = Shards.open(folder, verify=True)
    shards.check_words()
    assert len(shards.names) > 1 and shards.word_parts is not None
    encoded = encode_with_word_starts(load_tokenizer(folder / "tokenizer"), [*texts, UNKNOWN_INSIDE * 100])
    stream = np.concatenate([starts for _, starts in encoded])
    packs = Packs(shards, tokens=256, length=64, seed=1)
    for number in range(len(packs)):
        batch, positions = packs.batch(number), text_positions(packs, number).numpy()
        text = positions >= 0
        first = text & ~np.concatenate([[False], text[:-1]])
        assert (batch.starts_word.numpy() == (~text | first | stream[positions])).all()


def test_corrupt_word_flags_are_refused(folder):
    file = folder / "train-00000.starts.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.starts\.npy is damaged"):
        Shards.open(folder, verify=True)
    file.unlink()
    with pytest.raises(DataError, match=r"train-00000\.starts\.npy is missing"):
        Shards.open(folder)


def test_shards_of_an_earlier_version_have_no_word_flags(folder, make_shards):
    for path, knows in ((folder, False), (make_shards([100]), True)):
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["words"]
        (path / "manifest.json").write_text(json.dumps(manifest))
        shards = Shards.open(path)
        assert shards.word_parts is None and shards.word_sizes is None
        if knows:
            shards.check_words()
            continue
        with pytest.raises(DataError, match=r"an earlier version prepared it.*`masking\.unit` to token"):
            shards.check_words()


def test_units_without_words_are_not_written(texts, tmp_path):
    tokenizer = BY_PRE_TOKENIZER["bpe whitespace"](texts)
    with pytest.raises(DataError, match="need their word starts"):
        write_shards(tmp_path, tokenizer, {"train": [EncodedDocuments(np.array([7]), np.array([1]))]}, facts={})


def test_long_words_are_reported_as_clauses():
    sizes = WordLengths.of(np.bincount([1, 1, 2, 9, 30]))
    assert sizes == WordLengths(words=5, median=2, longest=30) and "clause" not in sizes.sentence()
    assert "clause" in WordLengths.of(np.bincount([5, 6, 7])).sentence()
    assert WordLengths.of(np.bincount([])) == WordLengths(0, 0, 0)


# ---- temporary settings


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_dropout_sampling_truncation_and_padding_are_switched_off(texts, model, tmp_path):
    tokenizer = bpe(texts, pre.Whitespace()) if model == "bpe" else unigram(texts, pre.Metaspace())
    sound = tokenizer.hash()
    [once] = tokenizer.encode([TEXT])
    if model == "bpe":
        tokenizer.backend.model.dropout = 0.5
    else:
        tokenizer.backend.model.alpha, tokenizer.backend.model.nbest_size = 0.1, 10
    tokenizer.backend.enable_truncation(3)
    tokenizer.backend.enable_padding()
    tokenizer.save(tmp_path)
    assert tokenizer.hash() == sound
    loaded = load_tokenizer(tmp_path)
    expected = {"truncation to 3 tokens", "padding"} | ({"dropout 0.5"} if model == "bpe" else set())
    assert set(loaded.switched_off) == expected
    assert all(ids.tolist() == once.tolist() for ids in loaded.encode([TEXT] * 20))
    # what is exported is what was loaded
    loaded.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").switched_off == ()
    # sampling is not in the file, but in the object
    switched = switch_off(tokenizer.backend)
    assert set(switched) - expected == ({"alpha 0.1", "nbest_size 10"} if model == "unigram" else set())
    assert all(tokenizer.backend.encode(TEXT, add_special_tokens=False).ids == once.tolist() for _ in range(20))
