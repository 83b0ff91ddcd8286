"""Documents from files and data sets: read as a stream, every fault named with its file and its byte or line.

Read are .txt, .jsonl, .parquet and .conllu files, each also packed as .gz, .xz or .zst, folders of them, and data sets
of the library datasets, by name or saved in a folder. Memory: one document, and for .parquet one group of rows. Speed
is that of unpacking and parsing: 20 to 100 MB of text a second.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import re
import shutil
import tempfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megamask.data import conllu
from megamask.data.conllu import Tagged
from megamask.data.zstd import ZstdReader, ZstdTruncated
from megamask.errors import DataError, raise_all

KINDS = (".txt", ".jsonl", ".parquet", ".conllu")
PACKED = (".gz", ".xz", ".zst")
BLOCK = 2**16
LONGEST = 2**28
"""Bytes of a document, at most: a file without an end to its lines, or a small file that unpacks without end, must not
take all memory."""
SHOWN = 80
"""Characters of a bad record that are told."""

Documents = Literal["blocks", "files"]
Bytes = io.BufferedIOBase
"""An open file, unpacked on the way or not."""


@dataclass(frozen=True)
class Reading:
    """How files are cut into documents, and where a record keeps its text."""

    documents: Documents = "blocks"
    """In .txt files: a document per block between blank lines, or per file; in .conllu files `# newdoc` or file."""
    text_field: str = "text"
    """The field of a .jsonl record or column of a .parquet file or data set that holds the text."""
    dataset_split: str = "train"
    """The split of a Hugging Face data set."""


@dataclass(frozen=True)
class Bad:
    """A document that cannot be used, and the sentence that says where it is and why."""

    problem: str


@dataclass(frozen=True)
class Source:
    """One input: a file, or a data set."""

    name: str
    """What identifies it whatever folder it lies in: the path below the input that the user gave."""
    path: Path | None
    """The file, or the folder of a saved data set; None for a data set by name."""

    @property
    def is_file(self) -> bool:
        """Whether it is a file, not a data set."""
        return self.path is not None and self.path.is_file()

    @property
    def size(self) -> int:
        """Bytes of the file as it lies on disk; 0 for a data set."""
        return self.path.stat().st_size if self.is_file and self.path else 0

    def open(self) -> AbstractContextManager[Bytes | None]:
        """The file as it lies on disk; None for a data set."""
        return self.path.open("rb") if self.is_file and self.path else nullcontext()

    def identity(self) -> dict[str, str | int]:
        """Name and content, for the manifest: sha256 of the file, or of the files of a saved data set."""
        if self.path is None:
            return {"name": self.name}
        files = [self.path] if self.is_file else sorted(p for p in self.path.rglob("*") if p.is_file())
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return {"name": self.name, "bytes": sum(f.stat().st_size for f in files), "sha256": digest.hexdigest()}


def find(inputs: Iterable[str]) -> list[Source]:
    """The sources that ``inputs`` name, in order; raises DataError with all that are missing, empty or unreadable."""
    sources: list[Source] = []
    problems: list[str] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            sources.append(Source(path.name, path))
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p))
            if not files:
                problems.append(f"{path} holds no {', '.join(KINDS)} file, packed or not.")
            sources += [Source(f"{path.name}/{file.relative_to(path).as_posix()}", file) for file in files]
        elif path.exists():
            if not kind_of(path):
                problems.append(f"{path} is of no known kind: its name must end in {_endings()}.")
            sources.append(Source(path.name, path))
        elif _looks_like_path(given):
            problems.append(f"{path} does not exist.")
        else:
            sources.append(Source(given, None))
    for source in sources:
        problems += _unreadable(source)
    raise_all(DataError, problems)
    return sources


def _unreadable(source: Source) -> Iterator[str]:
    if source.is_file and source.path:
        try:
            with source.path.open("rb") as file:
                if not file.read(1):
                    yield f"{source.path} is empty."
        except OSError as error:
            yield f"{source.path} cannot be read: {error.strerror}."


def kind_of(path: Path) -> str:
    """The kind of a file, packed or not: one of ``KINDS``, or "" for any other."""
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return next((kind for kind in KINDS if name.endswith(kind)), "")


def _looks_like_path(given: str) -> bool:
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", given) and not given.startswith((".", "/"))
    return not is_name or bool(kind_of(Path(given))) or Path(given).suffix in PACKED


def _endings() -> str:
    return f"{', '.join(KINDS)}, or one of these and {', '.join(PACKED)}"


# ---- reading


def documents(source: Source, reading: Reading, raw: Bytes | None) -> Iterator[str | Tagged | Bad]:
    """The documents of ``source`` in order, as they stand there; a fault gives a ``Bad`` in their midst.

    Those of .conllu files are ``Tagged``.
    ``raw`` is ``source.open()``; its ``tell()`` says how far the file is read.
    """
    if raw is None or source.path is None:
        yield from _dataset(source, reading)
        return
    path, kind = source.path, kind_of(source.path)
    try:
        with _unpacked(path, raw) as file:
            if kind == ".parquet":
                yield from _parquet(path, file, reading.text_field)
            elif kind == ".jsonl":
                for at, line, text in _lines(path, file):
                    if isinstance(text, Bad):
                        yield text
                    elif text and not text.isspace():
                        yield _record(f"{path}, line {line} (byte {at})", text, reading.text_field)
            elif kind == ".conllu":
                yield from _conllu(path, file, whole_file=reading.documents == "files")
            elif reading.documents == "files":
                yield _whole(path, file)
            else:
                yield from _blocks(path, file)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, ZstdTruncated) as error:
        yield Bad(f"{path} is damaged or cut short: {error}.")
    except OSError as error:
        yield Bad(f"{path} cannot be read: {error.strerror or error}.")


def _unpacked(path: Path, raw: Bytes) -> Bytes:
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if ending == ".xz":
        return lzma.LZMAFile(raw)  # type: ignore[arg-type]
    if ending == ".zst":
        return io.BufferedReader(ZstdReader(raw), BLOCK)
    return raw


_ZERO = "holds a zero byte: it may be UTF-16 or no text at all. Write it as UTF-8."
_LONG = f"is longer than {LONGEST:,} bytes. Cut it into documents."


def _lines(path: Path, file: Bytes) -> Iterator[tuple[int, int, str | Bad]]:
    """For each line: the byte at which it begins (of the unpacked text), its number from 1, its text or its fault."""
    at = number = 0
    while raw := file.readline(LONGEST + 1):
        number += 1
        size = len(raw)
        if size > LONGEST:
            text: str | Bad = Bad(f"{path}, line {number} (byte {at}) {_LONG}")
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(BLOCK)
                size += len(raw)
        else:
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                raw = b""  # or a long line would be held twice
            except UnicodeDecodeError as error:
                # behind a mark of byte order, bytes are counted from the mark
                start = error.start + (3 if number == 1 and raw.startswith(b"\xef\xbb\xbf") else 0)
                text = Bad(f"{path}, line {number} is not UTF-8: byte {at + start} is 0x{raw[start]:02x}.")
            if isinstance(text, str) and "\0" in text:
                text = Bad(f"{path}, line {number} (byte {at}) {_ZERO}")
        yield at, number, text
        at += size


def _conllu(path: Path, file: Bytes, *, whole_file: bool) -> Iterator[Tagged | Bad]:
    # a line that is no UTF-8 has no columns either: its own fault is told first
    faults: list[Bad] = []

    def lines() -> Iterator[tuple[int, str]]:
        for _, number, text in _lines(path, file):
            if isinstance(text, Bad):
                faults.append(text)
            yield number, "?" if isinstance(text, Bad) else text

    for found in conllu.documents(path, lines(), whole_file=whole_file):
        yield (faults[0] if faults else Bad(found)) if isinstance(found, str) else found
        faults.clear()


def _blocks(path: Path, file: Bytes) -> Iterator[str | Bad]:
    block: list[str] = []
    bad: Bad | None = None
    size = 0
    for at, number, text in _lines(path, file):
        if isinstance(text, Bad):
            bad = bad or text
        elif text and not text.isspace():
            size += len(text)
            if size > LONGEST:
                bad = bad or Bad(f"{path}: the document up to line {number} (byte {at}) {_LONG}")
            if bad:
                block.clear()
            else:
                block.append(text)
        elif block or bad:
            yield bad or "".join(block)
            block, bad, size = [], None, 0
    if block or bad:
        yield bad or "".join(block)


def _whole(path: Path, file: Bytes) -> str | Bad:
    blocks, size = [], 0
    while size <= LONGEST and (block := file.read(BLOCK)):  # one read would take all that it may give
        blocks.append(block)
        size += len(block)
    if size > LONGEST:
        return Bad(f"{path} {_LONG}")
    raw = b"".join(blocks)
    blocks.clear()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
        return Bad(f"{path} {_ZERO}") if "\0" in text else text
    except UnicodeDecodeError as error:
        return Bad(f"{path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}.")


def _record(place: str, line: str, field: str) -> str | Bad:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Bad(f"{place} is no JSON: {error}. It begins with {line[:SHOWN]!r}.")
    if not isinstance(record, dict):
        return Bad(f"{place} must be a JSON object, but is {type(record).__name__}: {line[:SHOWN]!r}.")
    return _field(place, record, field)


def _field(place: str, record: dict[str, Any], field: str) -> str | Bad:
    if field not in record:
        names = ", ".join(repr(name) for name in list(record)[:10]) or "none"
        return Bad(f"{place} lacks the field {field!r}; its fields are {names}. Set `text_field`.")
    text = record[field]
    if not isinstance(text, str):
        return Bad(f"{place}: the field {field!r} must be a string, but is {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Bad(f"{place}: the field {field!r} holds half a surrogate pair at character {error.start}.")
    return text


def _parquet(path: Path, file: Bytes, field: str) -> Iterator[str | Bad]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as plain:
        if not path.name.lower().endswith(".parquet"):
            # parquet is read from its end
            shutil.copyfileobj(file, plain)
            file = plain
        try:
            table = parquet.ParquetFile(file)
            if field not in table.schema_arrow.names:
                names = ", ".join(repr(name) for name in table.schema_arrow.names)
                yield Bad(f"{path} has no column {field!r}; its columns are {names}. Set `text_field`.")
                return
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _field(f"{path}, row {row}", {field: value}, field)
        except (pyarrow.ArrowException, OSError) as error:
            yield Bad(f"{path} is damaged or cut short: {str(error).splitlines()[0]}.")


def _dataset(source: Source, reading: Reading) -> Iterator[str | Bad]:
    import datasets

    try:
        if source.path is not None:
            found = datasets.load_from_disk(str(source.path))
            if isinstance(found, datasets.DatasetDict):
                found = found[reading.dataset_split]
        else:
            name, _, config = source.name.partition(":")
            found = datasets.load_dataset(name, config or None, split=reading.dataset_split, streaming=True)
        for row, record in enumerate(found, start=1):
            yield _field(f"{source.name}, row {row}", record, reading.text_field)
    except Exception as error:  # the library raises of every kind: no such name, no network, a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "is neither a file nor a folder here, and as a data set" if source.path is None else "as a data set"
        yield Bad(f"{source.name} {where} cannot be read (split {reading.dataset_split!r}): {reason}")


# ---- cleaning


def normalise(text: str) -> str:
    """NFC, newlines as "\\n", no space around; "" if nothing is left. A zero that a record holds counts as a space."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", " ")
    return unicodedata.normalize("NFC", text).strip()


def digest(text: str) -> bytes:
    """16 bytes that tell documents apart."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_valid(digest: bytes, share: float) -> bool:
    """Whether a document belongs to the validation split that takes ``share`` of all documents."""
    return int.from_bytes(digest[:8], "little") < share * 2**64
