"""Tags: each token has that of the first word it shares a character with, whatever the tokenizer and the pipeline."""

from __future__ import annotations

import gzip
import os
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.data import pos_tagger
from megamask.data.formats.conllu import TaggedDocument, read_conllu
from megamask.data.formats.lines import BadDocument
from megamask.data.inputs import find_inputs
from megamask.data.pos_tagger import TAG_IDS, TAGS, TaggedWords, Tagger, split_text
from megamask.data.read_documents import ReadOptions, read_documents
from megamask.data.shard_writer import write_sidecar
from megamask.data.shards import Shards
from megamask.data.tokenizer import Tokenizer
from megamask.data.tokenizer_training import train_tokenizer
from megamask.errors import ConfigError, DataError

TEXTS = [
    "Hello  world, don't stop the naïve Zażółć 😀 party. It's 42% off!",
    "The quick brown fox.\nA second line with café and ☃ snow, twice.",
]
SIZES = {"wordpiece": 200, "bpe": 300, "sentencepiece": 320, "sentencepiece-bpe": 320}
CONLLU = """\
# newdoc id = one
# sent_id = 1
# text = I don't know.
1\tI\tI\tPRON\tPRP\t_\t4\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\tVBP\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
4\tknow\tknow\tVERB\tVB\t_\t0\troot\t_\tSpaceAfter=No
4.1\tunwritten\tunwritten\tVERB\tVB\t_\t_\t_\t_\t_
5\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_

# newpar
1-2\tAu\t_\t_\t_\t_\t_\t_\t_\t_
1\tà\tà\tADP\t_\t_\t3\tcase\t_\t_
2\tle\tle\tDET\t_\t_\t3\tdet\t_\t_
3\tlac\tlac\tNOUN\t_\t_\t0\troot\t_\t_
4\t??\t??\t_\t_\t_\t3\tdep\t_\t_

# newdoc id = two
1\tYes\tyes\tINTJ\tUH\t_\t0\troot\t_\t_
"""


@pytest.fixture(scope="module", params=SIZES)
def tokenizer(request) -> Tokenizer:
    return train_tokenizer(request.param, TEXTS * 20, size=SIZES[request.param])


def by_character(words: TaggedWords, start: int, end: int, written: str) -> int:
    """The rule, character by character."""
    tag_at = {at: (w, tag) for w, tag in enumerate(words.tags.tolist()) for at in range(words.starts[w], words.ends[w])}
    inside = [tag_at[at] for at in range(start, end) if at in tag_at]
    if inside:
        return min(inside)[1]
    return tag_at[end][1] if not written.strip() and end in set(words.starts.tolist()) else 0


def split_at_spaces(written: str, draw) -> TaggedWords:
    """Words of the text, some of them in two, with tags of their own."""
    words, at = [], 0
    for word in written.split(" "):
        cuts = [at, at + len(word)]
        if len(word) > 3 and draw(st.booleans()):
            cuts.insert(1, at + draw(st.integers(1, len(word) - 1)))
        words += [(a, b, draw(st.integers(1, len(TAGS)))) for a, b in pairwise(cuts) if b > a]
        at += len(word) + 1
    return TaggedWords.of(words)


@given(st.data())
def test_every_token_has_the_tag_of_its_first_word(tokenizer, data):
    letters = st.text(st.sampled_from("abdeo',.éż😀漢"), min_size=1, max_size=8)
    written = " ".join(data.draw(st.lists(letters, min_size=1, max_size=8)))
    words = split_at_spaces(written, data.draw)
    [(ids, places)] = tokenizer.encode_with_offsets([written])
    assert np.array_equal(ids, tokenizer.encode([written])[0])
    expected = [by_character(words, a, b, written[a:b]) for a, b in places.tolist()]
    assert words.tags_of(*places.T).tolist() == expected


def test_all_tokens_of_a_word_have_its_tag(tokenizer):
    written = TEXTS[0]
    [(_, places)] = tokenizer.encode_with_offsets([written])
    one = written.index("Zażółć")
    words = TaggedWords.of([(one, one + 6, TAG_IDS["NOUN"])])
    tags = words.tags_of(*places.T)
    inside = [a < one + 6 and b > one for a, b in places.tolist()]
    assert sum(inside) > 0 and all(tags[inside] == TAG_IDS["NOUN"])
    others = tags[~np.array(inside)]
    assert set(others.tolist()) <= {0, TAG_IDS["NOUN"]} and (others > 0).sum() <= 1  # a space of its own before it
    assert not TaggedWords.of([]).tags_of(*places.T).any()


# ---- pipelines


class Stub:
    """What is used of a spaCy pipeline: words between spaces, tagged by their length."""

    def __init__(self):
        self.given: list[str] = []

    def pipe(self, texts, batch_size):
        for written in texts:
            self.given.append(written)
            at, tokens = 0, []
            for word in written.replace("\n", " ").split(" "):
                tokens.append(SimpleNamespace(idx=at, text=word, pos_=TAGS[len(word) % 17] if word else "SPACE"))
                at += len(word) + 1
            yield tokens


@given(st.lists(st.text(st.sampled_from("ab \n"), max_size=60), max_size=5))
def test_long_texts_are_tagged_in_pieces_at_the_same_positions(texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pos_tagger, "PIECE", 20)
        pipeline = Stub()
        tagged = Tagger(pipeline, {}).words(texts)
    assert "".join(pipeline.given) == "".join(texts) and all(0 < len(piece) <= 20 for piece in pipeline.given)
    for written, words in zip(texts, tagged, strict=True):
        named = [written[a:b] for a, b in zip(words.starts, words.ends, strict=True)]
        assert [TAG_IDS[TAGS[len(word) % 17]] for word in named] == words.tags.tolist()
        assert "".join(named) == "".join(written.split())


def test_pieces_end_behind_a_line_or_a_space(monkeypatch):
    monkeypatch.setattr(pos_tagger, "PIECE", 10)
    assert list(split_text("one two\nthree four fiveandmore")) == ["one two\n", "three ", "four ", "fiveandmor", "e"]


def examples() -> list[tuple[str, list[str]]]:
    """A few tagged sentences: of the tagged English in $MEGAMASK_POS where that is set, else those below."""
    folder = os.environ.get("MEGAMASK_POS")
    if folder:
        with gzip.open(Path(folder) / "en_ewt-ud-dev.conllu.gz", "rt", encoding="utf-8") as file:
            rows = [line.split("\t") for line in file.read(200_000).split("\n") if line[:1].isdigit()]
        rows = [row for row in rows if len(row) == 10 and row[0].isdigit() and row[3] in TAG_IDS]
        runs = [rows[at : at + 12] for at in range(0, 1200, 12)]
        return [(" ".join(row[1] for row in run), [row[3] for row in run]) for run in runs]
    words = {"the": "DET", "a": "DET", "dog": "NOUN", "cat": "NOUN", "sees": "VERB", "eats": "VERB", "big": "ADJ"}
    sentences = ["the dog sees a cat", "a big cat eats", "the cat sees the big dog", "a dog eats the cat"]
    return [(s, [words[w] for w in s.split()]) for s in sentences]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A small spaCy pipeline, trained here."""
    spacy = pytest.importorskip("spacy")
    from spacy.tokens import Doc
    from spacy.training import Example

    nlp = spacy.blank("en")
    nlp.add_pipe("morphologizer")
    docs = [Doc(nlp.vocab, words=written.split(), pos=tags) for written, tags in examples()]
    some = [Example(nlp.make_doc(doc.text), doc) for doc in docs]
    optimizer = nlp.initialize(lambda: some)
    for _ in range(15):
        nlp.update(some, sgd=optimizer)
    folder = tmp_path_factory.mktemp("pipeline") / "tagger"
    nlp.to_disk(folder)
    return folder


def test_a_trained_pipeline_tags_its_examples(pipeline):
    tagger = Tagger.load(str(pipeline))
    right = total = 0
    for (written, tags), words in zip(examples(), tagger.words([w for w, _ in examples()]), strict=True):
        at = 0
        for word, tag in zip(written.split(" "), tags, strict=True):
            here = [t for s, t in zip(words.starts.tolist(), words.tags.tolist(), strict=True) if s == at]
            right, total = right + (here == [TAG_IDS[tag]]), total + 1
            at += len(word) + 1
    assert right > 0.6 * total, "far more than the most frequent tag would"
    assert tagger.facts["tags"] == list(TAGS) and tagger.facts["by"]["pipeline"].startswith("en_")
    assert tagger.facts == Tagger.load(str(pipeline)).facts


@pytest.mark.parametrize("name", ["no_such_pipeline", "/no/such/folder"])
def test_an_unknown_pipeline_is_refused(name):
    pytest.importorskip("spacy")
    with pytest.raises(ConfigError, match=rf"`tags` must be 'conllu' or the name or folder .*'{name}'.*Installed: "):
        Tagger.load(name)


def test_a_pipeline_without_tags_is_refused(tmp_path):
    spacy = pytest.importorskip("spacy")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ConfigError, match="does not set part-of-speech tags"):
        Tagger.load(str(tmp_path / "blank"))


def test_without_spacy_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"spaCy is not installed\. .*megamask\[tags\]"):
        Tagger.load("en_core_web_sm")


# ---- CoNLL-U


def read(path: Path, **reading) -> list:
    [source] = find_inputs([str(path)]).sources
    with source.open() as raw:
        return list(read_documents(source, ReadOptions(**reading), raw))


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_documents_of_conllu_are_their_words_with_their_tags(tmp_path, packing):
    path = tmp_path / f"some.conllu{packing}"
    path.write_bytes(gzip.compress(CONLLU.encode()) if packing else CONLLU.encode())
    one, two = read(path)
    assert (one.text, two.text) == ("I don't know.\nAu lac ??", "Yes")
    named = [(one.text[a:b], tag) for a, b, tag in zip(one.words.starts, one.words.ends, one.words.tags, strict=True)]
    expected = [("I", "PRON"), ("do", "AUX"), ("n't", "PART"), ("know", "VERB"), (".", "PUNCT"), ("Au", "ADP")]
    assert named == [(word, TAG_IDS[tag]) for word, tag in [*expected, ("lac", "NOUN")]] + [("??", 0)]
    [whole] = read(path, documents="files")
    assert whole.text == f"{one.text} {two.text}"
    assert whole.words.tags.tolist() == one.words.tags.tolist() + two.words.tags.tolist()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("1\tYes", "must have 10 columns with tabs between them, as CoNLL-U has, but has 2."),
        ("x\tYes" + "\t_" * 8, "must begin with the number of a word, but begins with 'x'."),
        ("1\tYes\tyes\tADJECTIVE" + "\t_" * 6, "has the tag 'ADJECTIVE', which is not a universal tag"),
        ("1\t \tyes\tADJ" + "\t_" * 6, "has a word without a letter."),
    ],
)
def test_a_bad_line_is_reported_and_other_documents_are_read(line, sentence):
    lines = enumerate(["# newdoc", line, "# newdoc", *CONLLU.split("\n")], start=1)
    bad, one, two = read_conllu(Path("a.conllu"), lines, whole_file=False)
    assert isinstance(bad, str) and bad.startswith(f"a.conllu, line 2 {sentence}")
    assert isinstance(one, TaggedDocument) and isinstance(two, TaggedDocument)


def test_bytes_that_are_not_utf8_are_reported(tmp_path):
    path = tmp_path / "some.conllu"
    path.write_bytes(b"# newdoc\n1\t\xff\t_\n" + CONLLU.encode())
    bad, one, _two = read(path)
    assert isinstance(bad, BadDocument) and "line 2 is not UTF-8: byte 11 is 0xff" in bad.problem
    assert isinstance(one, TaggedDocument)


# ---- shards


def test_shards_without_tag_names_are_refused(make_shards):
    folder = make_shards([3, 4], valid=(5,))
    with pytest.raises(DataError, match=r"has no tags for the split 'train'\. .*--tags"):
        pos_tagger.tag_names(Shards.open(folder))
    write_sidecar(folder, "tags", "train", [np.zeros(7, np.uint8)], pos_tagger.conllu_facts())
    assert pos_tagger.tag_names(Shards.open(folder)) == TAGS
    with pytest.raises(DataError, match="no tags for the split 'valid'"):
        pos_tagger.tag_names(Shards.open(folder, "valid"))
    next(folder.glob("train-*.tags.npy")).unlink()
    with pytest.raises(DataError, match=r"tags\.npy is missing"):
        Shards.open(folder)
