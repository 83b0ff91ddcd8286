"""Documents are the same in every format and compression, and every error has its position."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterable

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.formats import compression, lines, plain_text
from megamask.data.formats.lines import BadDocument
from megamask.data.inputs import find_inputs
from megamask.data.read_documents import ReadOptions, document_hash, is_validation, normalize_text, read_documents
from megamask.errors import DataError

TEXTS = ["The first.\nTwo lines.", "Zażółć gęślą jaźń.", 'Third, with “quotes” and "these".']
zstd = functools.partial(pyarrow.compress, codec="zstd", asbytes=True)
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def read(path, **reading) -> list[str | BadDocument]:
    [source] = find_inputs([str(path)]).sources
    with source.open() as raw:
        return list(read_documents(source, ReadOptions(**reading), raw))


def kept(path, **reading) -> list[str]:
    return [normalize_text(document) for document in read(path, **reading)]


def as_parquet(texts) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), sink)
    return sink.getvalue().to_pybytes()


def as_jsonl(texts) -> bytes:
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def as_rows(separator) -> Callable[[Iterable[str]], bytes]:
    """A table as the module csv writes it."""

    def write(texts) -> bytes:
        file = io.StringIO()
        csv.writer(file, delimiter=separator).writerows([("id", "text"), *enumerate(texts)])
        return file.getvalue().encode()

    return write


FORMATS = {
    ".txt": lambda texts: "\n\n  \n".join(texts).encode(),
    ".jsonl": as_jsonl,
    ".ndjson": as_jsonl,
    ".parquet": as_parquet,
    ".csv": as_rows(","),
    ".tsv": as_rows("\t"),
    # the same suffix, laid out in four ways
    "-list.json": lambda texts: json.dumps([{"text": t} for t in texts], ensure_ascii=False).encode(),
    "-indented.json": lambda texts: json.dumps([{"text": t} for t in texts], indent=2).encode(),
    "-lines.json": as_jsonl,
    "-objects.json": lambda texts: "".join(json.dumps({"text": t}, indent=1) + "\n" for t in texts).encode(),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_and_compression_gives_the_same_documents(tmp_path, kind, packing):
    path = tmp_path / f"some{kind}{packing}"
    path.write_bytes(PACK[packing](FORMATS[kind](TEXTS)))
    assert kept(path) == TEXTS


def test_a_document_may_be_a_whole_file(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    assert kept(tmp_path / "a.txt", documents="files") == ["\n\n".join(TEXTS)]


@pytest.mark.parametrize(
    "raw",
    [
        "\ufeffOne.\r\nTwo.\r\n\r\nThree.".encode(),
        b"One.\nTwo.\n\n\n\nThree.\n\n",
        b"One.\rTwo.\r\rThree.\r",
        b"\rOne.\rTwo.\r\n\r\nThree.\r\r\n",
    ],
)
def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    assert kept(tmp_path / "a.txt") == ["One.\nTwo.", "Three."]


def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"body": TEXTS})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "two")
    assert kept(tmp_path / "one", text_field="body") == TEXTS
    assert kept(tmp_path / "two", text_field="body") == TEXTS
    assert kept(tmp_path / "two", text_field="body", dataset_split="test") == TEXTS[1:2]
    [bad] = read(tmp_path / "two", text_field="body", dataset_split="dev")
    assert "cannot be read (split 'dev'" in bad.problem


def test_the_splits_and_configurations_that_exist_are_named(monkeypatch):
    """They stand in the second line of what the library says."""
    datasets = pytest.importorskip("datasets")

    def load(name, config, **_):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    [bad] = read("somebody/some-data")
    assert "(split 'train', `dataset_split`)" in bad.problem and "['en', 'de']" in bad.problem


def test_a_dataset_that_does_not_exist_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [bad] = read("somebody/some-data")
    assert "is not a file or folder, and as a dataset cannot be read" in bad.problem


# ---- faults


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "cut', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'["text"]', "must be a JSON object, but is a list"),
        (b"7", "must be a JSON object, but is a number"),
        (b'{"body": "x", "id": 3}', "has no field 'text'; its fields are 'body', 'id'"),
        (b'{"text": null}', "the field 'text' must be a string, but is null"),
        (b'{"text": ["a"]}', "must be a string, but is a list"),
        (b'{"text": "A", "text": "B"}', "the field 'text' occurs 2 times"),
        (b'{"text": "A", "text": "A"}', "the field 'text' occurs 2 times"),
        (b'{"text": "\\ud800"}', "has an unpaired surrogate at character 0"),
    ],
)
def test_a_bad_line_is_named_and_its_neighbours_read(tmp_path, line, sentence):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl(["before"]) + b"\n" + line + b"\n" + as_jsonl(["after"]))
    before, bad, after = read(path)
    assert (before, after) == ("before", "after")
    start = len(as_jsonl(["before"])) + 1
    assert bad.problem.startswith(f"{path}, line 3 (byte {start})")
    assert sentence in bad.problem


@given(st.binary(min_size=1, max_size=200).map(lambda raw: raw.replace(b"\0", b"\1")))
def test_the_byte_that_is_not_utf8_is_named(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(b"A line.\n" + raw)
    whole, documents = b"A line.\n" + raw, read(path)
    try:
        whole.decode()
    except UnicodeDecodeError as error:
        assert any(
            isinstance(f, BadDocument) and f"byte {error.start} is 0x{whole[error.start]:02x}" in f.problem
            for f in documents
        )
    else:
        assert not any(isinstance(f, BadDocument) for f in documents)


@pytest.mark.parametrize("raw", ["Wide.".encode("utf-16-le"), "Wider.".encode("utf-32-be"), b"\0", b"a\0"])
def test_zero_bytes_are_refused_in_text_and_a_space_in_records(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(b"good\n\n" + raw + b"\n\nlast")
    good, bad, last = read(tmp_path / "a.txt")
    assert (good, last) == ("good\n", "last")
    assert bad.problem.startswith(f"{tmp_path}/a.txt, line 3 (byte 6) contains a zero byte")
    [bad] = read(tmp_path / "a.txt", documents="files")
    assert bad.problem.startswith(f"{tmp_path}/a.txt contains a zero byte")
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(["a\0b"]))
    assert kept(tmp_path / "a.jsonl") == ["a b"]


def test_a_bad_block_does_not_harm_its_neighbours(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"One.\n\nTwo \xff.\nMore of two.\n\nThree.")
    one, bad, three = read(path)
    assert (one.strip(), three) == ("One.", "Three.")
    assert bad.problem == f"{path}, line 3 is not UTF-8: byte 10 is 0xff."


@pytest.mark.parametrize("packing", compression.COMPRESSIONS)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_compressed_file_is_reported(tmp_path, kind, packing):
    # texts that do not pack well, so that cuts fall inside of the data too
    raw = PACK[packing](FORMATS[kind]([f"Text {n**7} {n}" for n in range(300)]))
    path = tmp_path / f"a{kind}{packing}"
    for cut in (1, 5, len(raw) // 2, len(raw) - 9, len(raw) - 1):
        path.write_bytes(raw[:cut])
        *_, last = read(path)
        assert isinstance(last, BadDocument) and str(path) in last.problem, cut


@pytest.mark.parametrize("packing", compression.COMPRESSIONS)
def test_a_corrupt_later_stream_is_reported(tmp_path, packing):
    first, second = PACK[packing](b"first\n\n"), PACK[packing](b"second " * 500)
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(first + second)
    assert kept(path) == ["first", ("second " * 500).strip()]
    damaged = bytes([second[0] ^ 255]) + second[1:]
    for rest in (damaged, second[:-1], second[:3], b"no stream"):
        path.write_bytes(first + rest)
        *_, last = read(path)
        assert isinstance(last, BadDocument) and "is corrupt or truncated" in last.problem and last.ends_file, rest


@pytest.mark.parametrize("kind", ["bz2", "xz"])
def test_any_corrupt_byte_of_a_later_stream_is_reported(tmp_path, kind):
    first, second = (PACK[f".{kind}"](raw) for raw in (b"first\n\n", b"second"))
    path = tmp_path / f"a.txt.{kind}"
    for at in range(len(second)):
        path.write_bytes(first + second[:at] + bytes([second[at] ^ 255]) + second[at + 1 :])
        last = read(path)[-1]
        assert isinstance(last, BadDocument) and "is corrupt or truncated" in last.problem, at


@pytest.mark.parametrize("zeros", [4, 2**15])
def test_zeros_behind_a_stream_of_xz_are_padding_in_multiples_of_four(tmp_path, zeros):
    one, two = lzma.compress(b"one\n\n"), lzma.compress(b"two")
    path = tmp_path / "a.txt.xz"
    path.write_bytes(one + bytes(zeros) + two + bytes(zeros))
    assert kept(path) == ["one", "two"]
    for raw in (one + bytes(zeros + 2) + two, one + two + bytes(zeros + 1)):
        path.write_bytes(raw)
        assert "is corrupt or truncated" in read(path)[-1].problem


@given(
    st.sampled_from(["bz2", "xz", "zst"]), st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.integers(1, 50)
)
def test_several_streams_are_read_with_any_block_size(tmp_path_factory, kind, parts, step):
    path = tmp_path_factory.mktemp("streams") / f"a.{kind}"
    path.write_bytes(b"".join(map(PACK[f".{kind}"], parts)))
    with path.open("rb") as raw, compression.open_compressed(path, raw) as file:
        assert b"".join(iter(lambda: file.read(step), b"")) == b"".join(parts)


def test_a_file_that_is_not_compressed_is_reported(tmp_path):
    for packing in compression.COMPRESSIONS:
        path = tmp_path / f"a.txt{packing}"
        path.write_bytes(b"plain text, not packed at all")
        [bad] = read(path)
        assert "is corrupt or truncated" in bad.problem


def test_parquet_faults(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet(["one", None, "three"]))
    one, bad, three = read(path)
    assert (one, three) == ("one", "three")
    assert bad.problem == f"{path}, row 2: the field 'text' must be a string, but is null."
    [bad] = read(path, text_field="body")
    assert "has no column 'body'; its columns are 'id', 'text'" in bad.problem
    path.write_bytes(path.read_bytes()[:-20])
    [bad] = read(path)
    assert "is corrupt or truncated" in bad.problem


def test_a_parquet_column_that_exists_twice_is_named(tmp_path):
    table = pyarrow.table([pyarrow.array(["A"]), pyarrow.array(["B"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    [bad] = read(tmp_path / "a.parquet")
    assert "has 2 columns 'text'. Rename all but one." in bad.problem


def test_all_inputs_that_cannot_be_used_are_named_at_once(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "folder").mkdir()
    given = [str(tmp_path / name) for name in ("empty.txt", "a.pdf", "folder", "missing.txt")]
    with pytest.raises(DataError) as caught:
        find_inputs([*given, "missing.jsonl.zst"])
    message = str(caught.value)
    assert len(caught.value.problems) == 5
    for name, sentence in (
        ("a.pdf", "has an unknown file type"),
        ("folder", "contains no file that can be read: .txt, .jsonl"),
        ("missing.txt", "does not exist."),
        ("missing.jsonl.zst", "does not exist."),
        ("empty.txt", "is empty."),
    ):
        assert f"{name} {sentence}" in message


# ---- memory


def peak(path, **reading) -> tuple[list, int]:
    """The documents, and the peak of the memory of Python."""
    [source] = find_inputs([str(path)]).sources
    tracemalloc.start()
    try:
        with source.open() as raw:
            documents = [
                (type(one), len(one) if isinstance(one, str) else 0)
                for one in read_documents(source, ReadOptions(**reading), raw)
            ]
        return documents, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SIZE = 2**22
SLACK = 2**18


@pytest.mark.parametrize(("name", "reading"), [("a.txt", {}), ("a.txt", {"documents": "files"}), ("a.txt.gz", {})])
def test_a_long_document_is_in_memory_twice_at_most(tmp_path, name, reading):
    """As bytes and as text."""
    path = tmp_path / name
    path.write_bytes(PACK[".gz" if name.endswith("gz") else ""](b"word " * (SIZE // 5)))
    documents, most = peak(path, **reading)
    assert documents == [(str, SIZE // 5 * 5)]
    assert most < 2 * SIZE + SLACK


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_line_without_end_does_not_use_up_the_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(lines, "MAX_DOCUMENT_BYTES", SIZE // 16)
    path = tmp_path / name
    path.write_bytes(PACK[".gz" if name.endswith("gz") else ""](b"word " * (SIZE // 5) + b"\n\n" + as_jsonl(["after"])))
    documents, most = peak(path)
    assert [kind for kind, _ in documents] == [BadDocument, str]
    assert most < 2 * SIZE // 16 + SLACK


def test_the_memory_test_fails_for_a_reader_that_keeps_lines(tmp_path, monkeypatch):
    read_lines, kept = lines.read_lines, []

    def keeping(*given):
        for one in read_lines(*given):
            kept.append([one[2] + "!", one[2] + "?"])
            yield one

    monkeypatch.setattr(plain_text, "read_lines", keeping)
    with pytest.raises(AssertionError):
        test_a_long_document_is_in_memory_twice_at_most(tmp_path, "a.txt", {})


# ---- cleaning and splitting


@given(st.text())
def test_normalized_text_is_nfc_and_normalizing_again_keeps_it(raw):
    clean = normalize_text(raw)
    assert unicodedata.is_normalized("NFC", clean)
    assert clean == clean.strip() == normalize_text(clean)
    assert document_hash(clean) == document_hash(normalize_text(unicodedata.normalize("NFD", raw)))


def test_the_validation_split_gets_its_share():
    digests = [document_hash(str(n)) for n in range(5000)]
    for share in (0.0, 0.01, 0.3):
        count = sum(is_validation(d, share) for d in digests)
        # five standard deviations of a binomial
        assert abs(count - share * 5000) <= 5 * (share * (1 - share) * 5000) ** 0.5
    # a larger share only adds documents
    assert all(is_validation(d, 0.3) for d in digests if is_validation(d, 0.01))
