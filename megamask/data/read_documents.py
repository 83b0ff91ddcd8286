"""Documents from files and data sets: read as a stream, every fault named with its file and its byte or line.

``sources`` finds the files, ``formats`` has a reader for each kind of file. Memory: one document, and for .parquet one
group of rows. Speed is that of unpacking and parsing: 20 to 100 MB of text a second.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamask.data.formats import (
    compression,
    conllu,
    delimited,
    huggingface_datasets,
    json_lines,
    json_values,
    parquet,
    plain_text,
)
from megamask.data.formats.conllu import TaggedDocument
from megamask.data.formats.delimited import SEPARATORS
from megamask.data.formats.fields import quoted_names
from megamask.data.formats.lines import BadDocument, ByteStream, FileWarning, read_lines
from megamask.data.input_file import InputFile
from megamask.data.settings import Documents

DocumentStream = Iterator[str | TaggedDocument | BadDocument | FileWarning]


@dataclass(frozen=True)
class ReadOptions:
    """How files are cut into documents, and where a record keeps its text."""

    documents: Documents = "blocks"
    """In .txt files: a document per block between blank lines, per line, or per file; in .conllu files `# newdoc` or
    file."""
    text_field: str = "text"
    """The field of a JSON record or column of a .csv, .tsv or .parquet file or data set that holds the text."""
    dataset_split: str = "train"
    """The split of a Hugging Face data set."""


def read_documents(source: InputFile, reading: ReadOptions, raw: ByteStream | None) -> DocumentStream:
    """The documents of ``source`` in order, as they stand there; a fault gives a ``BadDocument`` in their midst.

    Those of .conllu files are ``TaggedDocument``. A ``FileWarning`` is no document.
    ``raw`` is ``source.open()``; its ``tell()`` says how far the file is read.
    """
    path, field = source.path, reading.text_field
    if raw is None or path is None:
        yield from huggingface_datasets.read_saved_dataset(source.name, path, reading.dataset_split, field)
        return
    try:
        with compression.open_compressed(path, raw) as file:
            yield from _of_file(path, source.kind, file, reading)
    except compression.CORRUPT as error:
        yield BadDocument(f"{path} is corrupt or truncated: {error}.", ends_file=True)
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}" if error.errno else f"is corrupt or truncated: {error}"
        yield BadDocument(f"{path} {wrong}.", ends_file=True)


def _of_file(path: Path, kind: str, file: ByteStream, reading: ReadOptions) -> DocumentStream:
    field = reading.text_field
    if kind == ".parquet":
        yield from parquet.read_parquet(path, file, field)
    elif kind in (".jsonl", ".ndjson"):
        yield from json_lines.read_json_lines(path, file, field)
    elif kind == ".json":
        yield from json_values.read_json(path, file, field)
    elif kind in SEPARATORS:
        yield from delimited.read_delimited(path, file, field, SEPARATORS[kind])
    elif kind == ".conllu":
        yield from _conllu(path, file, whole_file=reading.documents == "files")
    elif reading.documents == "files":
        yield plain_text.read_whole_file(path, file)
    elif reading.documents == "lines":
        yield from plain_text.read_single_lines(path, file)
    else:
        yield from plain_text.read_blocks(path, file)


def _conllu(path: Path, file: ByteStream, *, whole_file: bool) -> Iterator[TaggedDocument | BadDocument]:
    # a line that is not UTF-8 has no columns either: its own fault is named first
    faults: list[BadDocument] = []

    def numbered() -> Iterator[tuple[int, str]]:
        for _, number, text in read_lines(path, file):
            if isinstance(text, BadDocument):
                faults.append(BadDocument(text.problem))
            yield number, "?" if isinstance(text, BadDocument) else text

    for found in conllu.read_conllu(path, numbered(), whole_file=whole_file):
        yield (faults[0] if faults else BadDocument(found)) if isinstance(found, str) else found
        faults.clear()


def option_problems(sources: Sequence[InputFile], reading: ReadOptions) -> list[str]:
    """Sentences for settings that do not fit the sources: a split that does not exist, a setting without effect."""
    found = []
    kinds = {source.kind for source in sources}
    saved = [source for source in sources if source.path is not None and not source.is_file]
    splits = {source.name: huggingface_datasets.splits(source.path) for source in saved if source.path is not None}
    split = reading.dataset_split
    for name, names in splits.items():
        if names and split not in names:
            found.append(f"{name} has no split {split!r}; its splits are {quoted_names(names)}. Set `dataset_split`.")
    by_name = any(source.path is None for source in sources)
    if split != ReadOptions.dataset_split and not by_name and all(names is None for names in splits.values()):
        found.append(f"`dataset_split` {split!r} has no effect: no input is a data set with splits. Remove it.")
    if reading.documents != ReadOptions.documents and kinds.isdisjoint((".txt", ".conllu")):
        found.append(f"`documents` {reading.documents!r} has no effect: no input is a .txt file. Remove it.")
    if reading.documents == "lines" and ".conllu" in kinds:
        found.append("`documents` must be 'blocks' or 'files' for .conllu files, but is 'lines'.")
    if reading.text_field != ReadOptions.text_field and kinds and kinds <= {".txt", ".conllu"}:
        found.append(f"`text_field` {reading.text_field!r} has no effect: no input has fields. Remove it.")
    return found


# ---- cleaning


def normalize_text(text: str) -> str:
    """NFC, newlines as "\\n", no byte order marks and no space around; "" if nothing is left.

    A zero that a record holds counts as a space.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", " ").replace("\ufeff", "")
    return unicodedata.normalize("NFC", text).strip()


def document_hash(text: str) -> bytes:
    """16 bytes that tell documents apart."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_validation(digest: bytes, share: float) -> bool:
    """Whether a document belongs to the validation split that takes ``share`` of all documents."""
    return int.from_bytes(digest[:8], "little") < share * 2**64
