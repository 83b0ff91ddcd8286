"""Lost text is counted: compared with the offsets of the library, and with characters that the test inserts."""

from __future__ import annotations

import unicodedata
from collections import Counter

import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megamask.data import local_text
from megamask.data.lost_text.counter import CoverageCounter
from megamask.data.lost_text.coverage import REMOVED, Coverage, removal_warning, shortened, sum_coverage
from megamask.data.tokenizer import ROLES, SPECIAL, Tokenizer
from megamask.data.tokenizer_training import COVERAGE, train_tokenizer
from megamask.errors import DataError

FOREIGN = ["Москва and 東京 are cities.", "A naïve café, ☂ and a\u0001b.", "x" * 150 + " is long.", "plain words"]
CHINESE = [chr(0x4E00 + number) for number in range(3000)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(local_text.collect_local_text(60_000))


def tokenizer(model, trainer, texts, pre=None, normalizer=None) -> Tokenizer:
    backend = Backend(model)
    if pre is not None:
        backend.pre_tokenizer = pre
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator([text for text in texts if text.isascii()], trainer)
    return Tokenizer(backend, dict(zip(ROLES, SPECIAL, strict=True)))


def options(**more):
    return {"vocab_size": 600, "special_tokens": list(SPECIAL), "show_progress": False} | more


def wordpiece(texts):
    normalizer = normalizers.BertNormalizer(strip_accents=True, lowercase=True)
    pre = pre_tokenizers.BertPreTokenizer()
    return tokenizer(
        models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(**options()), texts, pre, normalizer
    )


def bpe(texts, pre, **how):
    return tokenizer(models.BPE(**how), trainers.BpeTrainer(**options()), texts, pre)


def counted(tokenizer: Tokenizer, texts) -> Coverage:
    return CoverageCounter(tokenizer)(texts, tokenizer.encode(texts))


WITH_UNKNOWN = {
    "wordpiece": wordpiece,
    "bpe": lambda texts: bpe(texts, pre_tokenizers.Whitespace(), unk_token="[UNK]"),
    "bpe, fused": lambda texts: bpe(texts, pre_tokenizers.Metaspace(), unk_token="[UNK]", fuse_unk=True),
    "unigram": lambda texts: tokenizer(
        models.Unigram(), trainers.UnigramTrainer(unk_token="[UNK]", **options()), texts, pre_tokenizers.Metaspace()
    ),
    "wordlevel": lambda texts: tokenizer(
        models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(**options()), texts, pre_tokenizers.Whitespace()
    ),
}


@pytest.mark.parametrize("kind", WITH_UNKNOWN)
def test_unknown_tokens_match_the_offsets_of_the_library(texts, kind):
    """Also if only a few words of a long document are encoded again."""
    tokenizer = WITH_UNKNOWN[kind](texts)
    unknown = tokenizer.backend.token_to_id("[UNK]")
    long = " ".join([*texts[:20], FOREIGN[0], FOREIGN[1]])
    for documents in (FOREIGN, [long], [*texts[:20], *FOREIGN]):
        surfaces: Counter[str] = Counter()
        for text, encoding in zip(documents, tokenizer.encodings(documents), strict=True):
            places = zip(encoding.ids, encoding.offsets, strict=True)
            surfaces.update(text[begin:end] for number, (begin, end) in places if number == unknown)
        counts = counted(tokenizer, documents)
        assert counts.unknown_tokens == surfaces.total() > 0
        assert counts.unknown_characters == sum(len(text) * times for text, times in surfaces.items())
        assert counts.lost_characters == 0
        assert {text[:20] for text in counts.examples} == {text.strip()[:20] for text in surfaces}
        # the result is the same with and without encodings
        assert counts == CoverageCounter(tokenizer)(
            documents, tokenizer.encode(documents), tokenizer.encodings(documents)
        )


@pytest.mark.parametrize("pre", [pre_tokenizers.Metaspace(), pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
def test_characters_without_a_token_are_counted(texts, pre):
    """A BPE without an unknown token drops characters that are not in its alphabet."""
    counts = counted(bpe(texts, pre), FOREIGN)
    alphabet = {c for text in texts if text.isascii() for c in text}
    lost = Counter(c for text in FOREIGN for c in text if c not in alphabet and not c.isspace())
    assert counts.examples == lost and counts.lost_characters == lost.total() > 0
    assert counts.unknown_tokens == 0 and counts.share == lost.total() / counts.characters


def test_a_character_without_an_end_of_word_token_is_lost():
    """With </w>, a letter may be known inside a word alone."""
    backend = Backend(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend, {})
    assert [len(ids) for ids in tokenizer.encode(["ab", "ba", "aab a"])] == [2, 0, 3]
    assert counted(tokenizer, ["ab", "ba", "aab a"]).examples == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    "pre",
    [
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")]),
        pre_tokenizers.Split(Regex(r"[a-z ]+"), "removed", invert=True),
        pre_tokenizers.CharDelimiterSplit("#"),
    ],
)
def test_text_that_a_pre_tokenizer_drops_is_lost_except_space(texts, pre):
    counts = counted(bpe(texts, pre, unk_token="[UNK]"), ["some words, and 7 more. # here"])
    assert counts.examples == Counter("#" if isinstance(pre, pre_tokenizers.CharDelimiterSplit) else counts.examples)
    assert counts.examples["#"] == 1
    assert counted(bpe(texts, pre, unk_token="[UNK]"), ["some words and more here"]).lost_characters == 0


def test_an_unknown_space_is_shown():
    assert shortened(Counter({"\u3000": 2, " a ": 1})) == Counter({"\u3000": 2, "a": 1})


def test_intended_normalization_is_not_a_loss(texts):
    """Accents and capitals go, a control character is counted apart."""
    counts = counted(wordpiece(texts), ["NAÏVE Café", "con\u0001trol", unicodedata.normalize("NFD", "é")])
    assert (counts.unknown_tokens, counts.lost_characters, counts.removed_characters) == (0, 0, 2)


@pytest.mark.parametrize(
    ("steps", "removed"),
    [
        ([normalizers.Prepend("▁"), normalizers.Replace(Regex("[0-9é東]"), "")], "7東é12é9"),
        ([normalizers.Prepend("▁"), normalizers.Replace("東", " ")], "東"),
        ([normalizers.Replace(Regex(r"[a-z]+\d+"), "")], "ab12"),
        ([normalizers.Replace(Regex("[^ ]"), "")], "7東caféab12eé9▂"),
        ([normalizers.NFC(), normalizers.Replace("b", "")], "b"),
        ([normalizers.NFD(), normalizers.StripAccents(), normalizers.Replace("b", "")], "b\u0301"),
        ([normalizers.NFD(), normalizers.Replace(Regex(r"\p{Mn}"), "")], ""),
        ([normalizers.Replace(Regex(" {2,}"), " "), normalizers.Prepend("▁")], ""),
        ([normalizers.Replace("b", ""), normalizers.ByteLevel()], "b"),
    ],
)
def test_characters_that_the_normalizer_removes_are_counted(texts, steps, removed):
    """Also where the character alone would stay, or gets a mark of its own."""
    how = bpe(texts, pre_tokenizers.Whitespace(), unk_token="[UNK]")
    how.backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    counts = counted(how, ["7東 café  ab12 ▁", "e\u0301", "é9 ▂"])
    assert counts.removed_examples == Counter(removed) and counts.removed_characters == len(removed)


def test_a_warning_names_characters_that_the_normalizer_removes():
    allowed = Coverage(characters=100, removed_characters=round(100 * REMOVED), removed_examples=Counter("77é79"))
    assert removal_warning(allowed) is None and removal_warning(Coverage()) is None
    warning = removal_warning(sum_coverage([allowed, Coverage(removed_characters=1, removed_examples=Counter("é"))]))
    assert (
        warning and "removes 6.0% of the characters of the text (6 of 100), most often '7' 3, 'é' 2, '9' 1" in warning
    )
    assert "`normalizer` in tokenizer.json" in warning


@pytest.mark.parametrize("pre", [pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace()])
def test_a_byte_level_normalizer_loses_characters_not_bytes(texts, pre):
    """Not bytes; pre-tokenizers may cut between the bytes of a character."""
    how = bpe(texts, pre)
    how.backend.normalizer = normalizers.ByteLevel()
    counts = counted(how, ["déjà vu, 東京"])
    assert counts.examples == Counter("éà東京") and counts.lost_characters == 4


def test_counts_of_parts_add_up(texts):
    tokenizer = wordpiece(texts)
    documents = [*texts[:5], *FOREIGN]
    whole = counted(tokenizer, documents)
    assert sum_coverage(counted(tokenizer, [document]) for document in documents) == whole
    assert Coverage.of_record(whole.record(1000)) == whole
    assert counted(tokenizer, []) == Coverage()
    assert counted(tokenizer, texts).bytes == len("".join(texts).encode())


# ---- the alphabet of a new WordPiece


def test_the_alphabet_may_exceed_a_thousand_characters(texts):
    """Chinese characters stand alone, so each takes one token."""
    chinese = ["".join(CHINESE[at : at + 50]) + "。" for at in range(0, len(CHINESE), 50)]
    counts = counted(train_tokenizer("wordpiece", [*texts, *chinese], size=len(CHINESE) + 1000), chinese)
    assert counts.unknown_tokens == 0 and counts.tokens == len(CHINESE) + len(chinese)


def test_the_alphabet_ends_where_the_text_is_covered():
    common, rare = "".join(c * 100 for c in CHINESE), "".join(chr(0x20000 + number) for number in range(50))
    counts = counted(train_tokenizer("wordpiece", [common, rare], size=8000), [common, rare])
    assert 0 < counts.unknown_tokens <= (1 - COVERAGE) * len(common + rare)


def test_the_alphabet_ends_where_the_vocabulary_is_full():
    """The least frequent are left out, until too much of the text would be lost."""
    size = len(CHINESE)
    texts = ["".join(CHINESE), "".join(CHINESE[7:])]
    counts = counted(train_tokenizer("wordpiece", texts, size=size), texts)
    assert set(counts.examples) == set(CHINESE[7 - len(SPECIAL) : 7])
    with pytest.raises(DataError, match=rf"`vocab_size` must be at least \d+ .* but is {size // 2}"):
        train_tokenizer("wordpiece", texts, size=size // 2)
