"""Read the documents of files and datasets as a stream. Errors name the file and the byte or line.

``inputs`` finds the files, ``formats`` has a reader for each type of file. Memory: one document, for .parquet one group
of rows. Decompression and parsing take most of the time: 20 to 100 MB of text per second.
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
    csv_and_tsv,
    huggingface_datasets,
    json_lines,
    json_values,
    parquet,
    plain_text,
)
from megamask.data.formats.conllu import TaggedDocument
from megamask.data.formats.csv_and_tsv import SEPARATORS
from megamask.data.formats.fields import quoted_names
from megamask.data.formats.lines import BadDocument, ByteStream, FileWarning, SubsetText, read_lines
from megamask.data.input_file import InputFile
from megamask.data.settings import Documents
from megamask.errors import listed

DocumentStream = Iterator[str | SubsetText | TaggedDocument | BadDocument | FileWarning]


@dataclass(frozen=True)
class ReadOptions:
    """How files are split into documents, and which field of a record has the text."""

    documents: Documents = "blocks"
    """.txt files: a document per block between blank lines, per line, or per file. .conllu files: per `# newdoc` or per
    file."""
    text_field: str = "text"
    """The field with the text, in a JSON record, or the column of a .csv, .tsv or .parquet file or a dataset."""
    dataset_split: str = "train"
    """The split of a Hugging Face dataset."""
    split_by: str | None = None
    """The field whose value is the subset of a document, if there are subsets."""


def read_documents(source: InputFile, options: ReadOptions, raw: ByteStream | None) -> DocumentStream:
    """The documents of ``source`` in order, unchanged; one that cannot be read is a ``BadDocument``.

    Those of .conllu files are ``TaggedDocument``. A ``FileWarning`` is not a document. ``raw`` is ``source.open()``;
    its ``tell()`` shows how much of the file has been read.
    """
    path, fields = source.path, (options.text_field, options.split_by)
    if raw is None or path is None:
        yield from huggingface_datasets.read_saved_dataset(source.name, path, options.dataset_split, *fields)
        return
    try:
        with compression.open_compressed(path, raw) as file:
            yield from _read_file(path, source.kind, file, options)
    except compression.CORRUPT as error:
        yield BadDocument(f"{path} is corrupt or truncated: {error}.", ends_file=True)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}" if error.errno else f"is corrupt or truncated: {error}"
        yield BadDocument(f"{path} {problem}.", ends_file=True)


def _read_file(path: Path, kind: str, file: ByteStream, options: ReadOptions) -> DocumentStream:
    field, split_by = options.text_field, options.split_by
    if kind == ".parquet":
        yield from parquet.read_parquet(path, file, field, split_by)
    elif kind in (".jsonl", ".ndjson"):
        yield from json_lines.read_json_lines(path, file, field, split_by)
    elif kind == ".json":
        yield from json_values.read_json_documents(path, file, field, split_by)
    elif kind in SEPARATORS:
        yield from csv_and_tsv.read_delimited(path, file, field, SEPARATORS[kind], split_by)
    elif kind == ".conllu":
        yield from _conllu(path, file, whole_file=options.documents == "files")
    elif options.documents == "files":
        yield plain_text.read_whole_file(path, file)
    elif options.documents == "lines":
        yield from plain_text.read_single_lines(path, file)
    else:
        yield from plain_text.read_blocks(path, file)


def _conllu(path: Path, file: ByteStream, *, whole_file: bool) -> Iterator[TaggedDocument | BadDocument]:
    # a line that is not UTF-8 has no columns either: report the encoding first
    faults: list[BadDocument] = []

    def numbered() -> Iterator[tuple[int, str]]:
        for _, number, text in read_lines(path, file):
            if isinstance(text, BadDocument):
                faults.append(BadDocument(text.problem))
            yield number, "?" if isinstance(text, BadDocument) else text

    for document in conllu.read_conllu(path, numbered(), whole_file=whole_file):
        yield (faults[0] if faults else BadDocument(document)) if isinstance(document, str) else document
        faults.clear()


def option_problems(sources: Sequence[InputFile], options: ReadOptions) -> list[str]:
    """The problems of settings for these inputs: a split that does not exist, a setting without effect."""
    problems = []
    kinds = {source.kind for source in sources}
    saved = [source for source in sources if source.path is not None and not source.is_file]
    splits = {source.name: huggingface_datasets.splits(source.path) for source in saved if source.path is not None}
    split = options.dataset_split
    for name, names in splits.items():
        if names and split not in names:
            problems.append(
                f"{name} has no split {split!r}; its splits are {quoted_names(names)}. Set `dataset_split`."
            )
    by_name = any(source.path is None for source in sources)
    if split != ReadOptions.dataset_split and not by_name and all(names is None for names in splits.values()):
        problems.append(f"`dataset_split` {split!r} has no effect: no input is a dataset with splits. Remove it.")
    if options.documents != ReadOptions.documents and kinds.isdisjoint((".txt", ".conllu")):
        problems.append(f"`documents` {options.documents!r} has no effect: no input is a .txt file. Remove it.")
    if options.documents == "lines" and ".conllu" in kinds:
        problems.append("`documents` must be 'blocks' or 'files' for .conllu files, but is 'lines'.")
    if options.text_field != ReadOptions.text_field and kinds and kinds <= {".txt", ".conllu"}:
        problems.append(f"`text_field` {options.text_field!r} has no effect: no input has fields. Remove it.")
    if options.split_by is not None:
        problems += _split_by_problems(sources, options)
    return problems


def _split_by_problems(sources: Sequence[InputFile], options: ReadOptions) -> list[str]:
    problems = []
    if options.split_by == options.text_field:
        problems.append(f"`split_by` and `text_field` are both {options.split_by!r}. Name two fields.")
    without = [source.name for source in sources if source.kind in (".txt", ".conllu")]
    if without:
        have = "has" if len(without) == 1 else "have"
        problems.append(
            f"`split_by` needs records with the field {options.split_by!r}, but {listed(without, 'file')} {have} no "
            "fields. Convert them to .jsonl, or leave them out with `exclude`."
        )
    return problems


# ---- cleaning


def normalize_text(text: str) -> str:
    """NFC, newlines as "\\n", no byte order marks, no surrounding space; "" if nothing is left.

    A zero byte in a record becomes a space.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", " ").replace("\ufeff", "")
    return unicodedata.normalize("NFC", text).strip()


def document_hash(text: str) -> bytes:
    """A hash of 16 bytes, by which duplicates are found."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_validation(digest: bytes, share: float) -> bool:
    """Whether a document is in the validation split, which gets ``share`` of all documents."""
    return int.from_bytes(digest[:8], "little") < share * 2**64
