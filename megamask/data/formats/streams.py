"""Read .bz2 and .xz files of one or more streams.

``bz2.BZ2File`` and ``lzma.LZMAFile`` silently drop a corrupt stream after the first one.
"""

from __future__ import annotations

import bz2
import io
import lzma

BLOCK = 2**14


class StreamCorrupt(Exception):
    """The bytes after a stream are neither another stream nor padding."""


class StreamReader(io.RawIOBase):
    """The decompressed bytes of ``file``, stream after stream. Raises at any byte that belongs to no stream.

    ``decompressor`` is the class that decompresses one stream. Zeros in multiples of four may follow a stream of .xz.
    """

    def __init__(self, file: io.BufferedIOBase, decompressor: type[bz2.BZ2Decompressor] | type[lzma.LZMADecompressor]):
        self.file = file
        self.decompressor = decompressor
        self.stream = decompressor()
        self.compressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = b""
        while not data:
            if self.stream.eof and not self._next_stream():
                return 0
            compressed = b""
            if self.stream.needs_input:
                compressed, self.compressed = self.compressed or self.file.read(BLOCK), b""
                if not compressed:
                    raise EOFError("the file ends before its last stream does")
            data = self.stream.decompress(compressed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bool:
        """Begin the next stream; False at the end of the file."""
        compressed = self.stream.unused_data or self.file.read(BLOCK)
        padding = 0
        while self.decompressor is lzma.LZMADecompressor and compressed.startswith(b"\0"):
            rest = compressed.lstrip(b"\0")
            padding += len(compressed) - len(rest)
            compressed = rest or self.file.read(BLOCK)
        if padding % 4:
            raise StreamCorrupt(f"{padding} zeros follow a stream, but padding comes in multiples of four")
        self.compressed = compressed
        if compressed:
            self.stream = self.decompressor()
        return bool(compressed)
