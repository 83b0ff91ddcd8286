"""Nothing is lost on the way from text to packs: what goes in comes out, or is counted with the reason it was dropped.

Every defect that the readers know is planted in many places, and the sums are compared with what was planted.
"""

from __future__ import annotations

import gzip
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megamask.__main__ import main
from megamask.data import corpus, encoding
from megamask.data.formats import lines
from megamask.data.packs import Packs
from megamask.data.shards import SPLITS, Shards
from megamask.data.tokenizer import load_tokenizer
from tests.batches import text_positions
from tests.system.commands import run

LONGEST = 3000
PLACES = 50
Line = tuple[bytes, str, str]
"""A line, what becomes of it ("" if it is not a document, "kept", or the reason why it is dropped), and its text."""


def line(source: object, becomes: str, clean: str = "") -> Line:
    return json.dumps(source).encode(), becomes, clean


def kept(clean: str) -> Line:
    return line({"text": clean}, "kept", clean)


def duplicate(source: str, clean: str) -> Line:
    return line({"text": source}, "duplicate", clean)


DEFECTS: dict[str, Callable[[int, str], Line]] = {
    "no JSON": lambda n, other: (b"{", "bad", ""),
    "cut inside a word": lambda n, other: (b'{"text": "go', "bad", ""),
    "two objects": lambda n, other: (b'{"text": "a"} {"text": "b"}', "bad", ""),
    "a list": lambda n, other: line([other], "bad"),
    "a number": lambda n, other: line(n, "bad"),
    "nothing": lambda n, other: line(None, "bad"),
    "a word": lambda n, other: line(other, "bad"),
    "another field": lambda n, other: line({"body": other}, "bad"),
    "a field of nothing": lambda n, other: line({"text": None}, "bad"),
    "a field of a number": lambda n, other: line({"text": n}, "bad"),
    "a field of a list": lambda n, other: line({"text": [other]}, "bad"),
    "half a pair": lambda n, other: (b'{"text": "a\\udc00"}', "bad", ""),
    "half a pair, raw": lambda n, other: (b'{"text": "\xed\xa0\x80"}', "bad", ""),
    "no UTF-8": lambda n, other: (b'{"text": "caf\xe9"}', "bad", ""),
    "nested without end": lambda n, other: (b'{"text": ' + b"[" * 2900, "bad", ""),
    "too long": lambda n, other: line({"text": "word " * LONGEST}, "bad"),
    "an empty text": lambda n, other: line({"text": ""}, "blank"),
    "a text of space": lambda n, other: line({"text": " \r\n\t\u00a0" * n}, "blank"),
    "a text of zeros": lambda n, other: line({"text": "\0" * (n + 1)}, "blank"),
    "the same again": lambda n, other: duplicate(other, other),
    "the same with space": lambda n, other: duplicate(f"\r\n {other}\t", other),
    "the same taken apart": lambda n, other: duplicate(unicodedata.normalize("NFD", other), other),
    "no token": lambda n, other: line({"text": "\u0001" * (n + 1)}, "without_tokens"),
    "an empty line": lambda n, other: (b" \t" * (n % 3), "", ""),
    "a zero inside": lambda n, other: line({"text": f"zero\0{n}"}, "kept", f"zero {n}"),
    "a mark inside": lambda n, other: line({"text": f"mark\ufeff{n}"}, "kept", f"mark{n}"),
    "an old line's end": lambda n, other: line({"text": f"old\r{n}"}, "kept", f"old\n{n}"),
}
"""Of a .jsonl file; each gets a number and the text of a sound document."""


@dataclass
class Planted:
    """What went in."""

    documents: Counter = field(default_factory=Counter)
    """How many become what."""
    texts: list[str] = field(default_factory=list)
    """Of all that can be read, duplicates too."""
    again: list[str] = field(default_factory=list)
    """Of the duplicates."""

    def note(self, becomes: str, clean: str) -> None:
        if becomes:
            self.documents[becomes] += 1
            self.texts += [clean] if clean else []
            self.again += [clean] if becomes == "duplicate" else []


def sound(number: int, name: str) -> str:
    return f"Document {number} of the {name}, naïve and short: " + "word and letter " * (number % 7)


def shuffled(lines: list[Line], planted: Planted, seed: str) -> Iterator[bytes]:
    """The lines in any order, noted."""
    random.Random(seed).shuffle(lines)
    for raw, becomes, clean in lines:
        planted.note(becomes, clean)
        yield raw


def plant(folder: Path, places: int) -> Planted:
    """A corpus of every format, with every defect in so many places."""
    folder.mkdir()
    planted = Planted()
    texts = [sound(n, "first").strip() for n in range(6 * places)]
    lines = [kept(one) for one in texts]
    lines += [make(n, texts[n]) for make in DEFECTS.values() for n in range(places)]
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(shuffled(lines, planted, "a")))

    texts = [sound(n, "blocks").strip() for n in range(2 * places)]
    lines = [(one.encode(), "kept", one) for one in texts]
    lines += [(f"bad {n} ".encode() + b"\xff\nand more", "bad", "") for n in range(places)]
    lines += [(b"long\n" * LONGEST, "bad", "") for _ in range(places)]
    lines += [(one.encode(), "duplicate", one) for one in texts[:places]]
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"\n \n\n".join(shuffled(lines, planted, "b"))))

    rows = [(one, "kept", one) for one in (sound(n, "rows").strip() for n in range(2 * places))]
    rows += [(None, "bad", "")] * places + [("  ", "blank", "")] * places
    for _, becomes, clean in rows:
        planted.note(becomes, clean)
    pyarrow.parquet.write_table(pyarrow.table({"text": [row[0] for row in rows]}), folder / "c.parquet")

    word = "{0}\tword{1}\t_\t{2}" + "\t_" * 6 + "\n"
    lines = [(f"# newdoc\n{word.format(1, n, 'NOUN')}".encode(), "kept", f"word{n}") for n in range(places)]
    lines += [(f"# newdoc\n{word.format(1, n, 'THING')}".encode(), "bad", "") for n in range(places)]
    lines += [(b"# newdoc\n1\tword\n", "bad", "")] * places
    (folder / "d.conllu").write_bytes(b"\n".join(shuffled(lines, planted, "d")))
    return planted


def lost(folder: Path, planted: Planted) -> list[str]:
    """What does not add up in the shards and packs made of what was planted."""
    shards = {split: Shards.open(folder, split, verify=True) for split in SPLITS}
    read = Counter(shards["train"].manifest["read"])
    expected = Counter(planted.documents)
    tokenizer = load_tokenizer(folder / "tokenizer")
    encoded, unknown = tokenizer.encode(planted.texts), tokenizer.backend.token_to_id("[UNK]")
    sizes = {one: len(ids) for one, ids in zip(planted.texts, encoded, strict=True)}
    packed = {split: Packs(one, tokens=256, length=64, seed=0) for split, one in shards.items()}
    in_packs = sum(int((text_positions(packs, n) >= 0).sum()) for packs in packed.values() for n in range(len(packs)))
    left_out = sum(packs.left_out for packs in packed.values())
    sums = {
        "documents": (read.pop("documents"), expected.total()),
        "documents in shards": (sum(one.documents for one in shards.values()), expected.pop("kept")),
        **{f"documents {why}": (read[why], expected[why]) for why in read | expected},
        "tokens": (
            sum(one.tokens for one in shards.values()) + sum(sizes[one] for one in planted.again),
            sum(sizes[one] for one in planted.texts),
        ),
        "unknown tokens": (
            sum(int((part == unknown).sum()) for one in shards.values() for part in one.parts),
            sum(counts["unknown_tokens"] for counts in shards["train"].manifest["coverage"].values()),
        ),
        "tokens in packs": (in_packs + left_out, sum(one.tokens for one in shards.values())),
    }
    return [f"{what}: {actual} of {wanted}" for what, (actual, wanted) in sums.items() if actual != wanted]


def prepared(data: Path, folder: Path, places: int, patch: pytest.MonkeyPatch) -> Planted:
    patch.setattr(lines, "MAX_DOCUMENT_BYTES", LONGEST)
    planted = plant(folder / "corpus", places)
    flags = ["--input", folder / "corpus", "--output", folder / "made", "--tokenizer", data / "tokenizer"]
    more = ["--valid-share", 0.2, "--workers", 1, "--on-bad-document", "skip", "--bad-share", 1, "--lost-share", 1]
    ended = run(main, "prepare", *flags, *more)
    assert ended.code == 0, ended.err
    return planted


def test_all_that_goes_in_comes_out_or_is_counted(data: Path, tmp_path: Path, monkeypatch) -> None:
    planted = prepared(data, tmp_path, PLACES, monkeypatch)
    print(f"\n{len(DEFECTS) + 7} kinds of defect in {PLACES} places each: {dict(planted.documents)}")
    assert lost(tmp_path / "made", planted) == []
    assert all(planted.documents[why] >= PLACES for why in ("bad", "blank", "duplicate", "without_tokens"))


def test_one_document_lost_by_the_reader_is_found(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, number = corpus.read_documents, iter(range(10**9))
    monkeypatch.setattr(corpus, "read_documents", lambda *given: (one for one in whole(*given) if next(number) != 77))
    assert lost(tmp_path / "made", prepared(data, tmp_path, 3, monkeypatch))


def test_one_document_lost_on_the_way_is_found(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoding._encode_unit
    monkeypatch.setattr(encoding, "_encode_unit", lambda work, number, unit: whole(work, number, unit[1:]))
    assert lost(tmp_path / "made", prepared(data, tmp_path, 3, monkeypatch))
