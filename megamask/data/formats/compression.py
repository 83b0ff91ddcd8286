"""Compressed files, unpacked as they are read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path

from megamask.data.formats.lines import BLOCK, ByteStream
from megamask.data.formats.xz import StreamDamaged, StreamReader
from megamask.data.zstd import ZstdReader, ZstdTruncated

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
CORRUPT = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, StreamDamaged, ZstdTruncated)
"""What the readers raise for a file that is damaged or cut short; bz2 raises an OSError without a number."""


def open_compressed(path: Path, raw: ByteStream) -> ByteStream:
    """The content of ``raw``, the file ``path`` as it lies on disk."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if ending == ".bz2":
        return io.BufferedReader(StreamReader(raw, bz2.BZ2Decompressor), BLOCK)
    if ending == ".xz":
        return io.BufferedReader(StreamReader(raw, lzma.LZMADecompressor), BLOCK)
    if ending == ".zst":
        return io.BufferedReader(ZstdReader(raw), BLOCK)
    return raw
