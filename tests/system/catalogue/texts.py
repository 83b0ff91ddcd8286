"""Text that cannot be read, and tokenizers that cannot be used, met by megamask prepare."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from megamask.__main__ import main
from megamask.data.formats import lines
from tests.system.catalogue.row import CONFIG, DATA, DONE, Command, Ground, Plant, Row, rows


def prepared(*more: object) -> Callable[[Ground], list[object]]:
    """Arguments of megamask prepare, for a tokenizer that is there."""
    return lambda ground: ["--tokenizer", ground.data / "tokenizer", "--valid-share", 0.2, "--workers", 1, *more]


def source(name: str, *more: object) -> Callable[[bytes | None], Plant]:
    """A file of text; None: it is not there."""

    def holding(inside: bytes | None) -> Plant:
        def plant(ground: Ground) -> Command:
            path = ground.folder / name
            if inside is not None:
                path.write_bytes(inside)
            rest = prepared(*more)(ground)
            return main, ["prepare", "--input", path, "--output", ground.folder / "made", *rest]

        return plant

    return holding


def long_line(ground: Ground) -> Command:
    ground.patch.setattr(lines, "MAX_DOCUMENT_BYTES", 1000)
    return source("long.txt")(b"Short.\n\n" + b"long " * 500)(ground)


def parquet(**columns: list) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def occupied(ground: Ground) -> Command:
    (ground.folder / "made").mkdir()
    (ground.folder / "made" / "thesis.tex").write_text("precious")
    return source("good.txt")(b"Some words.")(ground)


MARKED = b"\xef\xbb\xbf" + b"".join(b"word " + b"a" * n + b"\n\n" for n in range(30))
WORD = "1\tword\t_\tNOUN" + "\t_" * 6 + "\n"
TEXT = [
    row
    for name, inside, what, culprits in [
        ("none.txt", None, "is not there", ["none.txt does not exist"]),
        ("empty.txt", b"", "is empty", ["empty.txt is empty"]),
        ("strange.doc", b"text", "is of another kind", ["strange.doc has an unknown file type"]),
        ("latin.txt", b"good\n\ncaf\xe9\n", "is not UTF-8", ["latin.txt, line 3 is not UTF-8: byte 9 is 0xe9"]),
        ("wide.txt", "good".encode("utf-16"), "is UTF-16", ["wide.txt, line 1 is not UTF-8: byte 0 is 0xff"]),
        ("zeros.txt", "bad".encode("utf-16-le"), "has zero bytes", ["zeros.txt, line 1 (byte 0) contains a zero byte"]),
        ("half.txt", b"\xef\xbb\xbfa\xed\xa0\x80", "holds half a pair, raw", ["line 1 is not UTF-8: byte 4 is 0xed"]),
        (
            "half.jsonl", b'{"text": "a\\ud800"}', "holds half a pair",
            ["line 1", "has an unpaired surrogate at character 1"],
        ),
        (
            "list.jsonl", b'{"text": "good"}\n[1]\n', "holds no objects",
            ["list.jsonl, line 2 (byte 17) must be a JSON object", "'[1]"],
        ),
        ("lacks.jsonl", b'{"txt": "good"}\n', "has no field", ["line 1", "has no field 'text'", "'txt'"]),
        ("null.jsonl", b'{"text": null}\n', "holds no words", ["line 1", "'text' must be a string, but is null"]),
        (
            "broken.jsonl", b'{"text": "go' + b"o" * 90 + b"\x1b[2J", "is broken",
            ["broken.jsonl, line 1", "is not valid JSON", """'{"text": "g""" + "o" * 69 + "'"],
        ),
        ("cut.txt.gz", b"\x1f\x8b\x08\x00", "is cut short", ["cut.txt.gz is corrupt or truncated"]),
        ("some.zip", b"PK", "is an archive", ["some.zip has an unknown file type", "Unpack .zip files"]),
        ("column.csv", b"id,body\n1,a\n", "lacks it in a table", ["has no column 'text'; its columns are 'id'"]),
        ("row.csv", b'text,id\n"a', "has an open quote", ["line 2 starts a quoted field that does not end"]),
        ("list.json", b'[{"text": "a"}, {', "is half a list", ["list.json, line 1 (byte 16)", "The rest of the file"]),
        ("column.parquet", parquet(body=["a"]), "lacks the column", ["has no column 'text'; its columns are 'body'"]),
        ("row.parquet", parquet(text=["a", None]), "holds no words, as rows", ["row.parquet, row 2", "null"]),
        ("no.parquet", b"PAR1", "not parquet", ["no.parquet is corrupt or truncated"]),
        ("tag.conllu", WORD.replace("NOUN", "THING").encode(), "holds odd tags", ["line 1 has the tag 'THING'"]),
        ("columns.conllu", b"1\tword\n", "lacks columns", ["line 1 must have 10 columns", "has 2"]),
    ]
    for row in rows(DATA, source(name), (f"text that {what}", inside, culprits))
] + [
    *rows(
        DATA, source("most.jsonl", "--on-bad-document", "skip"),
        (
            "too many bad documents", b"7\n" * 11,
            ["line 11", "11 of the 11 documents read so far cannot be used", "`bad_share` (0.001)"],
        ),
    ),
    *rows(
        DATA, source("some.jsonl", "--split-by", "lang"),
        ("no field to split by", b'{"text": "a"}\n' * 3, ["3 records", "line 1", "has no field 'lang'"]),
        ("a value that names no folder", b'{"text": "a", "lang": "../x"}\n', ["line 1", "'lang'", "'../x'"]),
        ("a value in one split only", b'{"text": "a", "lang": "de"}\n', ["has no text of the value de (1 document)"]),
    ),
    *rows(DATA, source("some.txt", "--split-by", "lang"), ("text without fields", b"a\n", ["some.txt has no fields"])),
    *rows(DATA, source("blank.txt"), ("no document", b" \n", ["blank.txt contains no documents"])),
    Row("a line without an end", long_line, DATA, ("long.txt, line 3 (byte 8) is longer than",)),
    Row("a folder that holds other things", occupied, DATA, ("made exists and does not contain prepared data",)),
    *rows(
        DONE, source("marked.txt"),
        ("a mark of byte order", MARKED, ["30 documents read (0 bad"]),
    ),
]  # fmt: skip


def lacking(role: str) -> Plant:
    """A tokenizer without one of the special tokens."""

    def plant(ground: Ground) -> Command:
        folder = Path(shutil.copytree(ground.data / "tokenizer", ground.folder / "tokenizer"))
        content = json.loads((folder / "tokenizer.json").read_text())
        token = f"[{role.upper()}]"
        content["model"]["vocab"] = {word: n for word, n in content["model"]["vocab"].items() if word != token}
        content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] != token]
        content["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return with_tokenizer(ground, folder)

    return plant


def configured(**roles: str) -> Plant:
    """A tokenizer whose configuration names other special tokens."""

    def plant(ground: Ground) -> Command:
        folder = Path(shutil.copytree(ground.data / "tokenizer", ground.folder / "tokenizer"))
        content = folder / "tokenizer_config.json"
        content.write_text(json.dumps(json.loads(content.read_text()) | roles))
        return with_tokenizer(ground, folder)

    return plant


def with_tokenizer(ground: Ground, folder: Path) -> Command:
    (ground.folder / "text.txt").write_text("some words\n\nand more\n")
    flags = ["--input", ground.folder / "text.txt", "--output", ground.folder / "made", "--tokenizer", folder]
    return main, ["prepare", *flags]


def no_tokenizer(inside: str | None) -> Plant:
    def plant(ground: Ground) -> Command:
        (ground.folder / "tokenizer").mkdir()
        if inside is not None:
            (ground.folder / "tokenizer" / "tokenizer.json").write_text(inside)
        return with_tokenizer(ground, ground.folder / "tokenizer")

    return plant


TOKENIZERS = [
    *(
        Row(f"no {role} token", lacking(role), CONFIG, (f"has no {role} token", f"[{role.upper()}]"))
        for role in ("mask", "pad", "cls", "sep")
    ),
    Row("mask is pad", configured(mask_token="[PAD]"), CONFIG, ("one token for mask and pad, '[PAD]'",)),
    *rows(
        DATA, no_tokenizer,
        ("no tokenizer", None, ["tokenizer contains no tokenizer.json"]),
        ("a tokenizer that is not valid JSON", "{", ["tokenizer.json is not valid JSON"]),
        ("a tokenizer that is none", "{}", ["tokenizer.json is not a tokenizer"]),
    ),
]  # fmt: skip
