"""One input of a preparation, a file or a dataset, and the file types by the endings of names."""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from megamask.data.formats.compression import COMPRESSIONS
from megamask.data.formats.lines import ByteStream
from megamask.runtime.progress_bar import ProgressBar
from megamask.storage.file_list import sha256

KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".conllu")
"""Types of files that can be read; each may be compressed."""
NO_ENDING = "without ending"


@dataclass(frozen=True)
class InputFile:
    """One input: a file, or a dataset."""

    name: str
    """Its identity, independent of where it is: the path below the input that the user gave."""
    path: Path | None
    """The file, or the folder of a saved dataset; None for a dataset by name."""

    @property
    def is_file(self) -> bool:
        """Whether it is a file, not a dataset."""
        return self.path is not None and self.path.is_file()

    @property
    def kind(self) -> str:
        """The type of a file, one of ``KINDS``; "" for a dataset."""
        return kind_of(self.path) if self.path is not None else ""

    @property
    def size(self) -> int:
        """Bytes of the file on disk; 0 for a dataset."""
        return self.path.stat().st_size if self.is_file and self.path else 0

    def open(self) -> AbstractContextManager[ByteStream | None]:
        """The open file, not decompressed; None for a dataset."""
        return self.path.open("rb") if self.is_file and self.path else nullcontext()

    def identity(self, bar: ProgressBar) -> dict[str, str | int]:
        """Name and content for the manifest: sha256 of the file, or of the files of a saved dataset.

        ``bar`` counts the bytes of files.
        """
        if self.path is None:
            return {"name": self.name}
        files = [self.path] if self.is_file else sorted(p for p in self.path.rglob("*") if p.is_file())
        digest = hashlib.sha256()
        for file in files:
            content = sha256(file, bar.update if self.is_file else lambda count: None)
            digest.update(bytes.fromhex(content))
        return {"name": self.name, "bytes": sum(f.stat().st_size for f in files), "sha256": digest.hexdigest()}


def kind_of(path: Path) -> str:
    """The type of a file, compressed or not: one of ``KINDS``, or "" for any other."""
    name = without_compression(path.name.lower())
    return next((kind for kind in KINDS if name.endswith(kind)), "")


def ending_of(path: Path) -> str:
    """The ending of a file in lower case, with that of its compression: ".jsonl.gz"."""
    name = path.name.lower()
    plain = without_compression(name)
    return utf8_name(Path(plain).suffix + name[len(plain) :]) or NO_ENDING


def utf8_name(name: str) -> str:
    """``name`` with escapes for bytes that are not UTF-8: a file name may contain them, a manifest may not."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def without_compression(name: str) -> str:
    """``name`` without the ending of a compression."""
    return next((name.removesuffix(ending) for ending in COMPRESSIONS if name.endswith(ending)), name)
