"""Compressed files (.gz, .bz2, .xz, .zst), decompressed as they are read. A truncated file raises."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import cast

from megamask.data.formats.lines import BLOCK, ByteStream
from megamask.data.formats.streams import StreamCorrupt, StreamReader

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
CORRUPT = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, StreamCorrupt)
"""Errors of the readers at a corrupt or truncated file. bz2 and pyarrow raise an OSError without an error number."""


def open_compressed(path: Path, raw: ByteStream) -> ByteStream:
    """The decompressed content of ``raw``, the open file ``path``."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if ending == ".bz2":
        return io.BufferedReader(StreamReader(raw, bz2.BZ2Decompressor), BLOCK)
    if ending == ".xz":
        return io.BufferedReader(StreamReader(raw, lzma.LZMADecompressor), BLOCK)
    if ending == ".zst":
        import pyarrow  # slow to import

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream), BLOCK)
    return raw
