"""Preparation: nothing lost, the same bytes however it ran, and refusals in sentences."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from megamask.__main__ import main
from megamask.data import encoding, local_text, pos_tagger
from megamask.data import prepare as preparing
from megamask.data.corpus import Corpus
from megamask.data.inputs import find_inputs
from megamask.data.prepare import local_data, prepare
from megamask.data.read_documents import ReadOptions
from megamask.data.settings import PrepareConfig
from megamask.data.shards import Shards
from megamask.data.tokenizer import ROLES, SPECIAL, Tokenizer, load_tokenizer
from megamask.data.word_boundaries import WordLengths
from megamask.errors import ConfigError, DataError, StorageError
from megamask.storage import workdir as work

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    """Real English of this machine, a paragraph a document."""
    return [line for document in local_text.collect_local_text(60_000) for line in document.split("\n")]


@pytest.fixture
def corpus(tmp_path, paragraphs) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    half = len(paragraphs) // 2
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs[:half]))
    (folder / "b.txt").write_text("\n\n".join(paragraphs[half:]))
    return folder


@pytest.fixture
def config(corpus, tmp_path) -> PrepareConfig:
    return PrepareConfig((str(corpus),), tmp_path / "out", vocab_size=600, valid_share=0.1, workers=1)


def change(config: PrepareConfig, **values) -> PrepareConfig:
    return replace(config, **values)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(encoding, "UNIT_BYTES", 5000)


def test_every_document_is_there_with_the_ids_of_its_text(config, paragraphs):
    folder = prepare(config)
    tokenizer = load_tokenizer(folder / "tokenizer")
    documents_by_ids = {}
    for split in ("train", "valid"):
        shards = Shards.open(folder, split, verify=True)
        [bounds], [ids] = list(shards.offsets()), shards.parts
        documents_by_ids[split] = [tuple(ids[begin:end].tolist()) for begin, end in pairwise(bounds)]
        assert (
            sum(map(len, documents_by_ids[split])) == shards.tokens and len(documents_by_ids[split]) == shards.documents
        )
    expected = [tuple(ids.tolist()) for ids in tokenizer.encode(paragraphs)]
    assert sorted(documents_by_ids["train"] + documents_by_ids["valid"]) == sorted(expected)
    # the order within a split is that of the text
    assert [ids for ids in expected if ids in set(documents_by_ids["train"])] == documents_by_ids["train"]
    assert abs(len(documents_by_ids["valid"]) - 0.1 * len(expected)) < 5 * (0.09 * len(expected)) ** 0.5
    for split in ("train", "valid"):
        inside, shards = set(documents_by_ids[split]), Shards.open(folder, split)
        size = sum(len(text.encode()) for text, ids in zip(paragraphs, expected, strict=True) if ids in inside)
        assert shards.bytes_per_token == size / shards.tokens
    assert not list(folder.parent.glob(".*partial*"))


def test_the_bytes_do_not_depend_on_the_workers(config, tmp_path, small_units):
    alone = contents(prepare(config))
    together = contents(prepare(change(config, output=tmp_path / "other", workers=2)))
    assert alone == together and len(alone) > 8


def test_the_bytes_do_not_depend_on_the_size_of_units(config, tmp_path, monkeypatch):
    one = contents(prepare(config))
    monkeypatch.setattr(encoding, "UNIT_BYTES", 5000)
    assert contents(prepare(change(config, output=tmp_path / "other"))) == one


def test_kills_do_not_change_the_bytes(config, tmp_path, corpus):
    """SIGKILL at several moments, for real; each run must find the finished units of those before it."""
    whole = contents(prepare(config))
    output = tmp_path / "killed"
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megamask.data import prepare as p\n"
        "from megamask.data import encoding as e\n"
        "e.UNIT_BYTES = 2000\n"
        "encode = e._encode_unit\n"
        "def slowly(*a):\n"
        "    time.sleep(0.02)\n"
        "    encode(*a)\n"
        "e._encode_unit = slowly\n"
        f"p.prepare(p.PrepareConfig(({str(corpus)!r},), Path({str(output)!r}), vocab_size=600, valid_share=0.1,"
        " workers=1))\n"
    )
    units = tmp_path / ".killed.partial" / "units"

    def count() -> int:
        return len(list(units.glob("*.npz")))

    for wanted in (1, 5, 9):
        process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 120
        while count() < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, "it must not be finished yet"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert count() >= wanted and not output.exists()
    kept = {file: file.stat().st_mtime_ns for file in units.glob("*.npz")}
    encoded = []
    encode_unit = encoding._encode_unit

    def seen(work, number, unit):
        encoded.append(number)
        encode_unit(work, number, unit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "UNIT_BYTES", 2000)
        patch.setattr(encoding, "_encode_unit", seen)
        prepare(change(config, output=output))
    assert contents(output) == whole
    assert encoded and not set(encoded) & {int(file.stem) for file in kept}


def test_every_document_is_counted(tmp_path, paragraphs):
    lines = [json.dumps({"text": p}) for p in paragraphs]
    lines += [lines[0], lines[3], json.dumps({"text": f"  {paragraphs[5]}\n"})]  # the same again
    lines += [json.dumps({"text": " \n"}), json.dumps({"text": ""})]
    lines += ["{", '{"body": "x"}', "7", '{"text": 3}']
    lines += [json.dumps({"text": "\u0001\u0002"})]  # WordPiece drops control characters
    file = tmp_path / "a.jsonl"
    file.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    config = PrepareConfig((str(file),), tmp_path / "out", vocab_size=600, valid_share=0.1, workers=1)
    with pytest.raises(DataError, match=rf"line {len(paragraphs) + 6} .* is not valid JSON"):
        prepare(config)
    train = Shards.open(prepare(change(config, on_bad_document="skip")))
    read = train.manifest["read"]
    assert read == {
        "documents": len(lines) + 1, "bad": 5, "blank": 2, "duplicate": 3, "without_tokens": 1
    }  # fmt: skip
    kept = sum(split["documents"] for split in train.manifest["splits"].values())
    assert kept == len(paragraphs) == read["documents"] - sum(n for why, n in read.items() if why != "documents")


def test_a_finished_folder_is_reused_and_another_refused(config, corpus):
    folder = prepare(config)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert prepare(change(config, workers=2)) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    for other in (change(config, vocab_size=601), change(config, valid_share=0.2)):
        with pytest.raises(DataError, match="was prepared from other text or with other settings"):
            prepare(other)
    with (corpus / "b.txt").open("a") as file:
        file.write("\n\nMore text.")
    with pytest.raises(DataError, match="was prepared from other text"):
        prepare(config)


def test_another_folder_is_not_touched(config):
    config.output.mkdir()
    (config.output / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="exists and does not contain prepared data"):
        prepare(config)
    assert [p.name for p in config.output.iterdir()] == ["thesis.tex"]


def test_leftovers_of_another_request_are_not_used(config, tmp_path, small_units, monkeypatch):
    whole = contents(prepare(config))
    other = change(config, output=tmp_path / "other", lowercase=True)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_publish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare(other)
    assert list((tmp_path / ".other.partial" / "units").iterdir())
    assert contents(prepare(change(other, lowercase=False))) == whole


def test_two_at_once_are_refused(config):
    with (
        work.folder(config.output.parent / f".{config.output.name}.partial", "x", config.output),
        pytest.raises(DataError, match="being written by another process"),
    ):
        prepare(config)


def test_an_existing_tokenizer_is_kept(config, tmp_path):
    first = prepare(config)
    again = prepare(change(config, tokenizer=str(first / "tokenizer"), vocab_size=None, output=tmp_path / "again"))
    assert np.array_equal(Shards.open(again).parts[0], Shards.open(first).parts[0])
    assert Shards.open(again).manifest["tokenizer"] == Shards.open(first).manifest["tokenizer"]


def test_the_tokenizer_sample_does_not_depend_on_order(config, corpus, tmp_path):
    small = change(config, tokenizer_bytes=20_000)

    def text_of(c):
        return Corpus(find_inputs(c.input).sources, ReadOptions(), "stop", 0.001, c.valid_share).sample(
            c.tokenizer_bytes
        )

    sample = text_of(small)
    assert 0 < sum(len(t.encode()) for t in sample) <= 20_000
    files = tuple(str(corpus / name) for name in ("b.txt", "a.jsonl"))
    assert text_of(change(small, input=files)) == sample


def test_all_invalid_settings_are_reported_at_once(config):
    wrong = change(config, input=(), valid_share=1.0, workers=-1, tokenizer_bytes=0, vocab_size=3)
    with pytest.raises(ConfigError) as caught:
        prepare(wrong)
    names = {"input", "valid_share", "workers", "tokenizer_bytes", "vocab_size"}
    assert {problem.split("`")[1] for problem in caught.value.problems} == names
    with pytest.raises(ConfigError, match="`vocab_size` has no effect on the existing tokenizer 'x'"):
        prepare(change(config, tokenizer="x"))


def test_no_validation_document_is_an_error(tmp_path, paragraphs):
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs[:20]))
    config = PrepareConfig((str(tmp_path / "a.txt"),), tmp_path / "out", tokenizer="bpe", vocab_size=300, workers=1)
    with pytest.raises(
        DataError, match=r"None of the 20 documents fell into the split 'valid': .* Try `--valid-share 0\.25`"
    ):
        prepare(change(config, valid_share=1e-9))
    assert Shards.open(prepare(change(config, valid_share=0.0))).manifest["splits"].keys() == {"train"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full", "a"), Exception("No space left on device (os error)")])
def test_a_full_disk_keeps_only_finished_work(config, monkeypatch, error):
    """Also where a library in Rust has the words of the operating system alone."""

    def full(*_, **__):
        raise error

    partial = config.output.parent / ".out.partial"
    for where, name, stays in ((Tokenizer, "save", False), (preparing.shard_writer, "save_array", True)):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, full)
            with pytest.raises(StorageError, match=rf"^{config.output} cannot be written: No space left") as raised:
                prepare(config)
        assert partial.exists() == (f"stays in {partial}" in str(raised.value)) == stays
        assert not config.output.exists() and not (partial / "ready").exists()
    Shards.open(prepare(config), verify=True)


def test_local_data_is_made_once(tmp_path, monkeypatch, paragraphs):
    documents = ["\n".join(paragraphs[at : at + 4]) for at in range(0, len(paragraphs), 4)]
    calls = []
    monkeypatch.setattr(local_text, "collect_local_text", lambda: calls.append(1) or iter(documents))
    monkeypatch.setattr(PrepareConfig, "valid_share", 0.1)
    folder = local_data(tmp_path, vocab_size=600)
    assert local_data(tmp_path, vocab_size=600) == folder and len(calls) == 1
    assert Shards.open(folder, verify=True).token_ids.size == 600
    assert Shards.open(folder, "valid").documents


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_command_line(corpus, tmp_path):
    out = tmp_path / "out"
    done = command("--input", corpus, "--output", out, "--vocab-size", 600, "--valid-share", 0.1, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert f"{Shards.open(out).tokens} tokens" in done.stdout
    assert "The validation split has" in done.stderr and "give more text" in done.stderr
    missing = command("--input", corpus / "c.txt", corpus / "d.pdf", "--output", tmp_path / "o")
    assert missing.returncode == DataError.exit_code
    assert missing.stderr == f"{corpus / 'c.txt'} does not exist.\n{corpus / 'd.pdf'} does not exist.\n"
    typo = command("--input", corpus, "--output", tmp_path / "o", "--vocab-sise", 600)
    assert typo.returncode == ConfigError.exit_code and "--vocab-size" in typo.stderr


# ---- parts of speech

CONLLU = """\
# newdoc
1-2\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tdo\tdo\tAUX\t_\t_\t3\taux\t_\t_
2\tn't\tnot\tPART\t_\t_\t3\tadvmod\t_\t_
3\tread{n}\tread\tVERB\t_\t_\t0\troot\t_\t_
4\tunbelievably\tunbelievably\tADV\t_\t_\t5\tadvmod\t_\t_
5\tlong\tlong\tADJ\t_\t_\t6\tamod\t_\t_
6\tbooks\tbook\tNOUN\t_\t_\t3\tobj\t_\tSpaceAfter=No
7\t.\t.\tPUNCT\t_\t_\t3\tpunct\t_\t_

"""


@pytest.fixture
def tagged(tmp_path) -> PrepareConfig:
    """The preparation of 200 documents that come with tags."""
    path = tmp_path / "tagged.conllu"
    path.write_text("".join(CONLLU.replace("{n}", str(n)) for n in range(200)))
    return PrepareConfig((str(path),), tmp_path / "out", vocab_size=200, valid_share=0.1, workers=1, tags="conllu")


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 200), ("bpe", 300)])
def test_every_token_has_the_tag_of_its_word(tagged, kind, size):
    folder = prepare(change(tagged, tokenizer=kind, vocab_size=size))
    tokenizer = load_tokenizer(folder / "tokenizer")
    for split in ("train", "valid"):
        shards = Shards.open(folder, split, verify=True)
        assert pos_tagger.tag_names(shards) == pos_tagger.TAGS
        [bounds], [ids], [tags] = list(shards.offsets()), shards.parts, shards.sidecar("tags")
        for begin, end in pairwise(bounds):
            words: dict[str, str] = {}
            for token, tag in zip(ids[begin:end], tags[begin:end].tolist(), strict=True):
                name = pos_tagger.TAGS[tag - 1]
                letters = tokenizer.backend.id_to_token(int(token)).encode("ascii", "ignore").decode()
                words[name] = words.get(name, "") + letters.strip("#0123456789")
            # a token across both words (a tokenizer may cut "don" and "'t") has the tag of the first
            assert words.pop("AUX") + words.pop("PART", "") == "don't"
            assert words == {"VERB": "read", "ADV": "unbelievably", "ADJ": "long", "NOUN": "books", "PUNCT": "."}


def test_tags_do_not_depend_on_workers_or_change_shards(tagged, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "UNIT_BYTES", 500)
    alone = contents(prepare(tagged))
    assert alone == contents(prepare(change(tagged, output=tmp_path / "many", workers=2)))
    plain = prepare(change(tagged, output=tmp_path / "plain", tags=None))
    assert Shards.open(plain).fingerprint == Shards.open(tagged.output).fingerprint
    without = contents(plain)
    ours = {f"{split}{ending}" for split in ("train", "valid") for ending in ("-00000.tags.npy", ".tags.json")}
    assert alone.keys() - without.keys() == ours
    assert all(alone[name] == data for name, data in without.items() if name != "manifest.json")
    # the same request finds what is there, another is refused
    assert prepare(tagged) == tagged.output
    for other in (change(tagged, tags=None), change(tagged, output=tmp_path / "plain")):
        with pytest.raises(DataError, match="was prepared with other tags, or only"):
            prepare(other)


def test_every_shard_has_the_tags_of_its_own_tokens(tagged, tmp_path, monkeypatch):
    """In many shards the bytes of the tags are those of one, cut where the tokens are."""
    whole = Shards.open(prepare(tagged)).sidecar("tags")[0]
    monkeypatch.setattr(encoding, "UNIT_BYTES", 500)
    write = preparing.shard_writer.write_shards
    monkeypatch.setattr(preparing.shard_writer, "write_shards", lambda *a, **k: write(*a, **k, shard_tokens=300))
    many = Shards.open(prepare(change(tagged, output=tmp_path / "many")), verify=True)
    assert len(many.parts) > 3 and np.array_equal(np.concatenate(many.sidecar("tags")), whole)


def test_tags_of_a_pipeline_do_not_depend_on_the_workers(tagged, tmp_path, monkeypatch):
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("attribute_ruler")
    ruler.add([[{"IS_PUNCT": True}]], {"POS": "PUNCT"})
    ruler.add([[{"IS_PUNCT": False}]], {"POS": "X"})
    nlp.to_disk(tmp_path / "pipeline")
    monkeypatch.setattr(encoding, "UNIT_BYTES", 2000)
    config = change(tagged, tags=str(tmp_path / "pipeline"))
    alone = contents(prepare(config))
    assert contents(prepare(change(config, output=tmp_path / "other", workers=2))) == alone
    shards = Shards.open(config.output, verify=True)
    dots = shards.parts[0] == load_tokenizer(config.output / "tokenizer").backend.token_to_id(".")
    assert np.array_equal(
        shards.sidecar("tags")[0], np.where(dots, pos_tagger.TAG_IDS["PUNCT"], pos_tagger.TAG_IDS["X"])
    )


def test_input_without_tags_and_an_unknown_pipeline_are_refused(tagged, corpus):
    with pytest.raises(DataError) as raised:
        prepare(change(tagged, input=(*tagged.input, str(corpus))))
    assert [sentence.split()[0] for sentence in raised.value.problems] == ["corpus/a.jsonl", "corpus/b.txt"]
    assert "every input must be a .conllu file" in str(raised.value)
    with pytest.raises(ConfigError, match="`tags`"):
        prepare(change(tagged, tags="no_such_pipeline"))
    assert not tagged.output.exists()


# ---- what is read


def test_read_and_skipped_files_are_in_the_manifest(config, corpus, tmp_path, capsys):
    fingerprint = Shards.open(prepare(config)).fingerprint
    (corpus / "notes.md").write_text("notes")
    (corpus / ".hidden").write_text("x")
    again = Shards.open(prepare(change(config, output=tmp_path / "again")))
    assert again.manifest["input_files"] == {
        "read": {p.suffix: {"files": 1, "bytes": p.stat().st_size} for p in (corpus / "a.jsonl", corpus / "b.txt")},
        "passed_over": {".md": {"files": 1, "bytes": 5}}, "hidden": 1, "excluded": 0, "empty": 0, "cut": 0,
    }  # fmt: skip
    assert "unsupported: 1 .md (5.00B); 1 hidden." in capsys.readouterr().err
    # the text is the same
    assert again.fingerprint == fingerprint


@pytest.mark.parametrize(
    ("name", "content"), [("c.jsonl", b""), ("c.txt.gz", gzip.compress(b" \n", mtime=0)), ("c.json", b"[]")]
)
def test_a_file_without_a_document_is_refused_or_counted(config, corpus, name, content):
    (corpus / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} (is empty|contains no documents)\. \(`on_bad_document` skip"):
        prepare(config)
    manifest = Shards.open(prepare(change(config, on_bad_document="skip"))).manifest
    assert manifest["input_files"]["empty"] == 1 and manifest["read"]["bad"] == 0


def test_a_text_with_one_document_per_line_is_recognized(config, tmp_path, capsys, paragraphs):
    lines = [f"{n} {paragraphs[n % len(paragraphs)]}" for n in range(1001)]
    (tmp_path / "tweets.txt").write_text("\n".join(lines))
    tweets = change(config, input=(str(tmp_path / "tweets.txt"),))
    with pytest.raises(DataError, match=r"one document, and two splits need two.*`--documents`"):
        prepare(tweets)
    stderr = capsys.readouterr().err
    assert stderr.count("`--documents lines`") == 1  # though the text is read twice
    assert f"{tmp_path}/tweets.txt has a document of {len(lines):,} lines" in stderr
    read = Shards.open(prepare(change(tweets, documents="lines"))).manifest["read"]
    assert read["documents"] == len(lines)
    assert "`--documents lines`" not in capsys.readouterr().err


def test_settings_that_do_not_fit_the_inputs_are_refused_early(config, corpus, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"test": data, "dev": data}).save_to_disk(tmp_path / "splits")
    data.save_to_disk(tmp_path / "one")
    for wrong, sentence in (
        ({"input": (str(tmp_path / "splits"),)}, "splits has no split 'train'; its splits are 'test', 'dev'"),
        ({"input": (str(tmp_path / "one"),), "dataset_split": "dev"}, "`dataset_split` 'dev' has no effect"),
        ({"dataset_split": "dev"}, "`dataset_split` 'dev' has no effect"),
        ({"input": (str(corpus / "a.jsonl"),), "documents": "lines"}, "`documents` 'lines' has no effect"),
        ({"input": (str(corpus / "b.txt"),), "text_field": "body"}, "`text_field` 'body' has no effect"),
    ):
        with pytest.raises(DataError, match=sentence):
            prepare(change(config, **wrong))


def test_conllu_tags_need_documents_that_conllu_has(tagged):
    with pytest.raises(DataError, match=r"`documents` must be 'blocks' or 'files' for \.conllu files"):
        prepare(change(tagged, documents="lines"))


def test_partly_read_files_are_named_and_counted(config, corpus, capsys):
    """One fault may cost a file's documents, however many: a share of bad documents does not show it."""
    (corpus / "c.csv").write_text("id,body\n" + "1,x\n" * 1000)
    (corpus / "d.json").write_text('[{"text": "one"}, {"text": }, {"text": "three"}]')
    (corpus / "e.jsonl").write_text('{"text": 1}\n' * 30)
    skipping = change(config, on_bad_document="skip", bad_share=0.01)
    manifest = Shards.open(prepare(skipping)).manifest
    assert manifest["read"]["bad"] == 32 and manifest["input_files"]["cut"] == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Skipped: ")]
    assert "c.csv has no column 'text'" in lines[0] and "The rest of the file is not read" in lines[1]
    # of other faults the first ones, and none twice
    assert len(lines) == len(set(lines)) == 10


def test_a_file_name_that_is_not_utf8_is_accepted(config, corpus):
    os.rename(corpus / "b.txt", os.fsencode(corpus) + b"/caf\xe9.txt")
    inputs = Shards.open(prepare(config)).manifest["inputs"]
    assert inputs[1]["name"] == "corpus/caf\\xe9.txt"


# ---- what the tokenizer loses, and where its words begin


@pytest.fixture
def whitespace_bpe(paragraphs, tmp_path) -> Path:
    """A BPE that knows no foreign letters, whose tokens do not show where words begin, with dropout in its file."""
    backend = Backend(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"vocab_size": 600, "special_tokens": list(SPECIAL), "show_progress": False}
    backend.train_from_iterator([p for p in paragraphs if p.isascii()], trainers.BpeTrainer(**options))
    backend.model.dropout = 0.1
    Tokenizer(backend, dict(zip(ROLES, SPECIAL, strict=True))).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def lossy(config, corpus, whitespace_bpe) -> PrepareConfig:
    (corpus / "c.jsonl").write_text("".join(json.dumps({"text": f"東京 {n} и ещё"}) + "\n" for n in range(9)))
    return change(config, tokenizer=str(whitespace_bpe), vocab_size=None, lost_share=0.5)


def test_counts_and_words_do_not_depend_on_workers_or_kills(lossy, tmp_path, small_units, monkeypatch):
    """Nor does dropout in the tokenizer's file."""
    whole = contents(prepare(lossy))
    assert any(name.endswith(".starts.npy") for name in whole)
    assert contents(prepare(change(lossy, output=tmp_path / "two", workers=2))) == whole
    stopped = change(lossy, output=tmp_path / "stopped")
    encode, left = encoding._encode_unit, [5]

    def some(*given):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        encode(*given)

    monkeypatch.setattr(encoding, "_encode_unit", some)
    with pytest.raises(KeyboardInterrupt):
        prepare(stopped)
    monkeypatch.setattr(encoding, "_encode_unit", encode)
    assert contents(prepare(stopped)) == whole


def test_the_counts_are_those_of_the_text(lossy, capsys):
    arguments = [*("--input", *lossy.input), "--output", str(lossy.output), "--tokenizer", lossy.tokenizer]
    assert main(["prepare", *arguments, "--lost-share", "0.5", "--valid-share", "0.1", "--workers", "1"]) == 0
    stdout = capsys.readouterr().out
    manifest = Shards.open(lossy.output).manifest
    unknown = load_tokenizer(lossy.tokenizer).backend.token_to_id("[UNK]")
    for split, counts in manifest["coverage"].items():
        shards = Shards.open(lossy.output, split)
        assert counts["tokens"] == shards.tokens
        assert counts["unknown_tokens"] == sum(int((part == unknown).sum()) for part in shards.parts)
        assert f"{counts['unknown_tokens']:,} of {counts['tokens']:,} tokens are unknown" in stdout
        assert shards.word_parts is not None and shards.word_sizes is not None
    examples = {text for counts in manifest["coverage"].values() for text, _ in counts["examples"]}
    assert {"東", "京", "щ"} <= examples
    assert manifest["switched_off"] == ["dropout 0.1"] and "dropout 0.1" in stdout
    # sizes of words by the plainest code
    shards = Shards.open(lossy.output)
    [offsets], [starts] = list(shards.offsets()), shards.word_parts
    begins = np.union1d(np.flatnonzero(starts), offsets[:-1])
    sizes = np.diff(begins, append=shards.tokens)
    assert shards.word_sizes == WordLengths(len(sizes), int(np.sort(sizes)[(len(sizes) - 1) // 2]), int(sizes.max()))


def test_a_text_that_loses_much_is_refused_with_a_cheap_cure(lossy, monkeypatch):
    with pytest.raises(DataError, match=r"loses .* more than `lost_share` \(0\.001\) allows: .* '東'"):
        prepare(change(lossy, lost_share=0.001))
    assert not lossy.output.exists()
    monkeypatch.setattr(encoding, "_encode_unit", lambda *given: pytest.fail("encoded again"))
    assert Shards.open(prepare(lossy)).manifest["coverage"]


def test_a_character_that_cannot_be_encoded_is_named_with_its_file(config, corpus, paragraphs, tmp_path):
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"vocab_size": 600, "special_tokens": list(SPECIAL), "show_progress": False}
    backend.train_from_iterator([p for p in paragraphs if p.isascii()], trainers.UnigramTrainer(**options))
    Tokenizer(backend, dict(zip(ROLES, SPECIAL, strict=True))).save(tmp_path / "tokenizer")
    (corpus / "a.jsonl").write_text('{"text": "plain"}\n{"text": "to 東京"}\n')
    (corpus / "b.txt").unlink()
    sentence = r"cannot encode the character '東' \(U\+6771\), in corpus/a\.jsonl, .* begins with 'to 東京': .*Choose"
    with pytest.raises(DataError, match=sentence):
        prepare(change(config, tokenizer=str(tmp_path / "tokenizer"), vocab_size=None))


def test_a_full_disk_leaves_no_half_written_unit(config, monkeypatch) -> None:
    fsync = os.fsync

    def full(handle: int) -> None:
        if "/units/" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        prepare(config)
    assert not config.output.exists()
    assert not list((config.output.parent / ".out.partial" / "units").iterdir())
