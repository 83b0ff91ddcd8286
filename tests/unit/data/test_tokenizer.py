"""Tokenizers: transformers loads trained ones and gives the same ids; the conversion of sentencepiece keeps its ids."""

from __future__ import annotations

import json
import unicodedata

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend

from megamask.data import local_text, tokenizer_training
from megamask.data.tokenizer import SPECIAL, Tokenizer, load_tokenizer, token_ids, tokenizer_hash
from megamask.data.tokenizer_training import train_tokenizer
from megamask.data.word_boundaries import encode_with_word_starts, word_starts
from megamask.errors import ConfigError, DataError

KINDS = ("wordpiece", "bpe", "sentencepiece", "sentencepiece-bpe")
SIZE = 1000
STRANGE = [
    "Zażółć gęślą jaźń; façade, naïve, 北京 and 😀 don't re-read (it) <0x41> ▁.",
    "Tabs\tand\u00a0spaces  here,\nnew\n\nlines, III and XXIII, aaaaaaa.",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real English, which this machine holds, and a few strange characters."""
    return [*local_text.collect_local_text(100_000), *STRANGE]


@pytest.fixture(scope="module")
def trained(texts) -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(kind, texts, size=SIZE) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(trained, kind):
    return trained[kind]


def test_size_and_special_ids(tokenizer):
    ids = token_ids(tokenizer)
    assert ids.size == tokenizer.size == SIZE
    assert sorted(tokenizer.backend.get_vocab().values()) == list(range(SIZE))
    assert (ids.pad, ids.cls, ids.sep, ids.mask) == (0, 2, 3, 4)
    assert ids.special == tuple(tokenizer.backend.token_to_id(token) for token in SPECIAL)


def test_training_again_gives_the_same(tokenizer, kind, texts, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert train_tokenizer(kind, texts, size=SIZE).hash() == tokenizer.hash()


def test_saved_and_loaded_it_is_the_same(tokenizer, texts, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.roles == tokenizer.roles
    assert again.hash() == tokenizer.hash() == tokenizer_hash(tmp_path)
    for one, other in zip(tokenizer.encode(texts), again.encode(texts), strict=True):
        assert one.tolist() == other.tolist()
    # the hash is that of the content, not of the layout, and sees every change of it
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert tokenizer_hash(tmp_path) == tokenizer.hash()
    content["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_hash(tmp_path) != tokenizer.hash()


def test_transformers_loads_it_and_gives_the_same_ids(tokenizer, texts, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.is_fast and len(theirs) == SIZE
    ids = token_ids(tokenizer)
    assert (theirs.mask_token_id, theirs.pad_token_id) == (ids.mask, ids.pad)
    assert tuple(sorted(theirs.all_special_ids)) == ids.special
    for text, ours in zip(texts, tokenizer.encode(texts), strict=True):
        assert theirs(text)["input_ids"] == [ids.cls, *ours.tolist(), ids.sep]
    pair = theirs("One.", "Two.")
    assert pair["input_ids"].count(ids.sep) == 2


def test_a_mask_replaces_a_word_without_changing_its_neighbors(tokenizer, tmp_path):
    """Around [MASK] the ids are those of the sentence with a word in its place."""
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    before, after = tokenizer.encode(["The value of the"])[0].tolist(), tokenizer.encode(["x is used."])[0].tolist()
    one = len(tokenizer.encode(["x"])[0])
    masked = theirs("The value of the [MASK] is used.", add_special_tokens=False)["input_ids"]
    assert masked == [*before, theirs.mask_token_id, *after[one:]]


def test_special_tokens_written_in_a_text_are_text(tokenizer):
    written = "[CLS] a [MASK] b [SEP] [PAD] [UNK]"
    [ids] = tokenizer.encode([written])
    assert not set(ids.tolist()) & (set(token_ids(tokenizer).special) - {tokenizer.backend.token_to_id("[UNK]")})
    # and the switch is back where transformers expects it
    assert token_ids(tokenizer).mask in tokenizer.backend.encode(written).ids


def test_composed_and_decomposed_letters_are_the_same(tokenizer):
    composed, decomposed = tokenizer.encode([unicodedata.normalize(form, STRANGE[0]) for form in ("NFC", "NFD")])
    assert composed.tolist() == decomposed.tolist()


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "sentencepiece-bpe"])
def test_no_token_is_unknown_and_decoding_restores_the_text(trained, texts, kind):
    tokenizer = trained[kind]
    unknown = tokenizer.backend.token_to_id("[UNK]")
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert unknown not in ids
        if kind == "bpe":
            assert tokenizer.decode(ids) == text
        else:
            assert tokenizer.decode(ids).split() == text.replace("▁", " ").split()


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_the_ids_of_sentencepiece_survive_the_conversion(texts, algorithm):
    model = tokenizer_training.train_sentencepiece(texts, size=SIZE, lowercase=False, algorithm=algorithm)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    converted = Tokenizer(tokenizer_training.convert_sentencepiece(model, lowercase=False), {})
    front = tokenizer_training.sentencepiece_normalizer(False)
    lines = [line.strip() for text in texts for line in text.split("\n") if line.strip()]
    theirs = [processor.encode(front.normalize_str(line)) for line in lines]
    assert [ids.tolist() for ids in converted.encode(lines)] == theirs
    assert [converted.backend.id_to_token(i) for i in range(SIZE)] == [processor.id_to_piece(i) for i in range(SIZE)]


def test_lowercase(texts, kind):
    tokenizer = train_tokenizer(kind, texts, size=SIZE, lowercase=True)
    upper, lower = tokenizer.encode([STRANGE[0].upper(), STRANGE[0].lower()])
    assert upper.tolist() == lower.tolist()


# ---- words


def test_words_begin_by_the_rule(tokenizer, kind):
    special = set(token_ids(tokenizer).special) - {tokenizer.backend.token_to_id("[UNK]")}
    table = word_starts(tokenizer)
    assert table.shape == (SIZE,) and table[list(special)].all()
    text = "The value, which is used (in all examples) here, isn't the name."
    [(ids, starts)] = encode_with_word_starts(tokenizer, [text])
    pieces = [tokenizer.backend.id_to_token(int(i)).lstrip("▁Ġ").removeprefix("##") for i in ids]
    words: list[str] = []
    for piece, start in zip(pieces, starts, strict=True):
        if start or not words:
            words.append(piece)
        else:
            words[-1] += piece
    # WordPiece marks letters behind punctuation, sentencepiece does not, the pre-tokenizer of "bpe" keeps "'t" together
    expected = {
        "wordpiece": "The value , which is used ( in all examples ) here , isn ' t the name .",
        "bpe": "The value , which is used ( in all examples ) here , isn 't the name .",
    }
    joined = "The value , which is used (in all examples ) here , isn 't the name ."
    assert [word for word in words if word] == expected.get(kind, joined).split()


def test_bytes_inside_a_character_do_not_begin_a_word(trained):
    for kind in ("bpe", "sentencepiece", "sentencepiece-bpe"):
        tokenizer = trained[kind]
        [(ids, starts)] = encode_with_word_starts(tokenizer, ["x\U0001f9ea"])
        assert len(ids) > 4
        assert not starts[-3:].any()


# ---- what is refused


@pytest.mark.parametrize("role", ["mask", "pad", "cls", "sep"])
def test_a_tokenizer_without_a_special_token_is_refused(tiny_tokenizer, tmp_path, role):
    without = Tokenizer(tiny_tokenizer.backend, {r: t for r, t in tiny_tokenizer.roles.items() if r != role})
    with pytest.raises(ConfigError, match=f"The tokenizer has no {role} token"):
        token_ids(without)


def test_all_missing_special_tokens_are_reported_at_once(tiny_tokenizer):
    with pytest.raises(ConfigError) as caught:
        token_ids(Tokenizer(tiny_tokenizer.backend, {"mask": "<none>"}))
    assert len(caught.value.problems) == 4
    assert "says '<none>', which is not in its vocabulary" in "".join(caught.value.problems)


def test_an_older_folder_without_roles_has_the_usual_names(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert token_ids(load_tokenizer(tmp_path)) == token_ids(tiny_tokenizer)
    assert isinstance(load_tokenizer(tmp_path).backend, Backend)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", None, "contains no tokenizer.json, so it is not a fast tokenizer"),
        ("tokenizer.json", "{", "is not valid JSON"),
        ("tokenizer.json", "[]", "must contain a JSON object"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
    ],
)
def test_a_damaged_folder_is_refused(tiny_tokenizer, tmp_path, name, content, sentence):
    tiny_tokenizer.save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=sentence):
        load_tokenizer(tmp_path)


def test_the_folder_around_a_tokenizer_is_refused(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=rf"so it is not a fast tokenizer\. Name {tmp_path}/tokenizer instead\.$"):
        load_tokenizer(tmp_path)


def test_an_unknown_name_is_refused():
    with pytest.raises(DataError, match=r"`tokenizer` must be 'wordpiece', .* but is 'wordpeice'\. Looking for"):
        load_tokenizer("wordpeice")


SIZES = [("wordpiece", 50), ("bpe", 200), ("sentencepiece", 100), ("sentencepiece", 10**6)]


@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_impossible_vocabulary_sizes_are_refused(texts, kind, size):
    with pytest.raises(DataError, match="`vocab_size`"):
        train_tokenizer(kind, texts[-20:], size=size)
