"""Readers of .json, .csv, .tsv and .txt: all records of sound files, and a place for every fault."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.formats import lines
from megamask.data.formats.lines import BadDocument, FileWarning
from megamask.data.inputs import find_inputs
from megamask.data.read_documents import ReadOptions, normalize_text, read_documents


def read(path, **reading) -> list[str | BadDocument]:
    [source] = find_inputs([str(path)]).sources
    with source.open() as raw:
        return list(read_documents(source, ReadOptions(**reading), raw))


def problems(path, **reading) -> list[str]:
    return [document.problem for document in read(path, **reading) if isinstance(document, BadDocument)]


def written(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=30)


# ---- JSON


@given(st.lists(TEXT, min_size=1, max_size=5), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40))
def test_json_is_read_in_any_layout_and_block_size(tmp_path_factory, texts, indent, ascii_only, block):
    records = [{"id": n, "text": one, "more": [{"text": "x"}]} for n, one in enumerate(texts)]
    path = written(tmp_path_factory.mktemp("json"), "a.json", json.dumps(records, indent=indent, ensure_ascii=ascii))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megamask.data.formats.json_values.BLOCK", block)
        assert read(path) == texts
        path.write_text("\n".join(json.dumps(one, indent=indent, ensure_ascii=ascii) for one in records))
        assert read(path) == texts


@pytest.mark.parametrize("content", ["", " \n", "[]", "[\n]\n"])
def test_json_without_a_record_has_no_document(tmp_path, content):
    path = written(tmp_path, "a.json", content or " ")
    assert read(path) == []


def test_a_truncated_list_gives_its_complete_objects_and_an_error(tmp_path):
    texts = [f"text {n}, “quoted” and [bracketed]" for n in range(5)]
    raw = json.dumps([{"text": one, "n": -1.5e3} for one in texts], ensure_ascii=False).encode()
    path = tmp_path / "a.json"
    for cut in range(1, len(raw)):
        path.write_bytes(raw[:cut])
        *sound, last = read(path)
        assert isinstance(last, BadDocument) and sound == texts[: len(sound)], cut


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (b'{"text": "cut', "is not valid JSON"),
        (b"[1]", "must be a JSON object, but is a number"),
        (b"7", "must be a JSON object, but is a number"),
        (b'{"body": "x"}', "has no field 'text'; its fields are 'body'"),
        (b'{"text": "caf\xe9"}', "is not UTF-8: byte {} is 0xe9"),
        (b'{"text": "a\0"}', "is not valid JSON"),
        (b'{"text": ' + b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_bad_line_of_a_json_file_loses_only_this_line(tmp_path, bad, sentence):
    first = b'{"text": "before"}\n\n'
    path = written(tmp_path, "a.json", first + bad + b'\n{"text": "after"}\n')
    before, fault, after = read(path)
    assert (before, after) == ("before", "after")
    assert fault.problem.startswith(f"{path}, line 3 (byte {len(first) + (bad == b'[1]')})")
    assert sentence.format(len(first) + bad.find(b"\xe9")) in fault.problem


@pytest.mark.parametrize("field", ["text", "é", 'a "b"'])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_field_that_occurs_twice_in_its_object_is_a_bad_document(tmp_path, name, field):
    keys = json.dumps(field), json.dumps(field, ensure_ascii=False)
    twice = [f'{{{one}: "A", "id": 1, {two}: "B"}}' for one in keys for two in keys]
    # elsewhere in a record it is not a second text
    sound = [{field: "one", "more": {field: "x", "again": [{field: "y"}]}}, {"kind": field, field: "two"}]
    records = [json.dumps(sound[0]), *twice, json.dumps(sound[1])]
    one, *bad, two = read(written(tmp_path, name, "\n".join(records)), text_field=field)
    assert (one, two) == ("one", "two") and len(bad) == 4
    assert all(f"the field {field!r} occurs 2 times" in document.problem for document in bad)


def test_an_error_in_a_list_says_that_the_rest_is_lost(tmp_path):
    path = written(tmp_path, "a.json", '[{"text": "one"},\n{"text": }, {"text": "three"}]')
    one, fault = read(path)
    assert one == "one" and fault.problem.startswith(f"{path}, line 2 (byte 18) is not valid JSON")
    assert fault.problem.endswith("The rest of the file is not read.")


def test_a_record_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_DOCUMENT_BYTES", 1000)
    long = '{"text": "' + "x" * 200_000
    path = written(tmp_path, "a.json", long + '"}\n{"text": "after"}')
    fault, after = read(path)
    assert "is longer than 1,000 bytes" in fault.problem and after == "after"


# ---- tables


def table(rows, separator: str = ",", **how) -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=separator, **how).writerows(rows)
    return file.getvalue()


@given(st.lists(TEXT, min_size=1, max_size=5), st.sampled_from([",", "\t"]), st.sampled_from(["\r\n", "\n"]))
def test_a_table_gives_the_texts_that_csv_wrote(tmp_path_factory, texts, separator, end):
    rows = [("text", "id"), *((one, n) for n, one in enumerate(texts))]
    name = "a.csv" if separator == "," else "a.TSV"
    raw = "\ufeff" + table(rows, separator, lineterminator=end, quoting=csv.QUOTE_ALL)
    path = written(tmp_path_factory.mktemp("table"), name, raw)
    assert read(path) == texts


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("id,body\n1,x\n", "has no column 'text'; its columns are 'id', 'body'. Set `text_field`"),
        ("id;text\n1;x\n", "has no column 'text'; its columns are 'id;text'. Its separator seems to be ';'"),
        ("text,text\nx,y\n", "has 2 columns 'text'"),
        ('text,id\n"open,1\nmore\n', "line 2 starts a quoted field that does not end"),
        ("text,id\nx\n", "line 2 must have 2 fields, as the header has, but has 1"),
        ("text,id\nx,y,z\n", "line 2 must have 2 fields, as the header has, but has 3"),
        ('text,id\n"a"b,1\n', "line 2 is not a valid row of a table with quotes"),
        (b"text,id\ncaf\xe9,1\n", "line 2 is not UTF-8: byte 11 is 0xe9"),
        (b"text,id\na\0,1\n", "line 2 (byte 8) contains a zero byte"),
        ("text,id\nx,1\n".encode("utf-16"), "It looks like UTF-16"),
    ],
)
def test_a_fault_of_a_table_is_named(tmp_path, content, sentence):
    path = written(tmp_path, "a.csv", content)
    [problem, *_] = problems(path)
    assert problem.startswith(str(path)) and sentence in problem


def test_a_bad_row_does_not_harm_its_neighbours(tmp_path):
    bad = b'"caf\xe9\nmore",2\n'
    path = written(tmp_path, "a.csv", b'text,id\r\n"one\r\ntwo",1\r\n' + bad + b"x\n\nfour,4\n")
    one, latin, short, four = read(path)
    assert (normalize_text(one), four) == ("one\ntwo", "four")
    assert f"{path}, line 4 is not UTF-8" in latin.problem and f"{path}, line 6 must have 2 fields" in short.problem


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_row_of_many_lines_gives_one_warning_per_file(tmp_path, name, separator):
    rows = "".join(f"some words{separator}{n}\n" for n in range(120))
    swallowed = f'"unbalanced{separator}0\n{rows}and an inch is 1"{separator}2\n'
    path = written(tmp_path, name, f"text{separator}id\nfirst{separator}1\n" + 2 * swallowed)
    first, remark, *texts = read(path)
    assert first == "first" and len(texts) == 2 and all(isinstance(one, str) for one in texts)
    assert isinstance(remark, FileWarning) and remark.message.startswith(f"{path}, line 3 starts a row of 122 lines")
    assert "double the quotes inside it" in remark.message
    long = "\n".join(["line"] * 100)
    assert read(written(tmp_path, name, table([("text", "id"), (long, "1")], separator))) == [long]


def test_a_field_larger_than_the_limit_of_the_csv_module_is_read(tmp_path, monkeypatch):
    large = "word " * 50_000
    path = written(tmp_path, "a.csv", table([("text",), (large,), ("after",)]))
    assert read(path) == [large, "after"]
    monkeypatch.setattr(lines, "MAX_DOCUMENT_BYTES", 1000)
    assert "is longer than 1,000 bytes" in problems(path)[0] and read(path)[-1] == "after"


# ---- plain text


def test_a_line_may_be_a_document(tmp_path):
    path = written(tmp_path, "tweets.txt", "one\r\n\r\n  \ntwo\n\ufeffthree\rfour\n")
    assert [normalize_text(document) for document in read(path, documents="lines")] == [
        "one",
        "two",
        "three",
        "four",
    ]
    assert [normalize_text(document) for document in read(path)] == ["one", "two\nthree\nfour"]


def test_byte_order_marks_of_joined_files_are_removed(tmp_path):
    joined = "\ufeffThe same.\n\n\ufeffThe same.\n\nOther.\ufeff\n"
    path = written(tmp_path, "a.txt", joined)
    assert {normalize_text(document) for document in read(path)} == {"The same.", "Other."}
    assert "\ufeff" not in normalize_text(read(path, documents="files")[0])
    path = written(tmp_path, "a.jsonl", '\ufeff{"text": "one"}\n\ufeff{"text": "\ufefftwo"}\n')
    assert [normalize_text(document) for document in read(path)] == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("documents", ["blocks", "files"])
def test_utf16_is_named(tmp_path, name, documents):
    path = written(tmp_path, name, "text\n\nsome\n".encode("utf-16"))
    [problem, *_] = problems(path, documents=documents)
    assert "is not UTF-8: byte 0 is 0xff" in problem and "It looks like UTF-16" in problem
