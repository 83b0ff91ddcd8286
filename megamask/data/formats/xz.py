"""Reading .bz2 and .xz files of one or more streams.

``bz2.BZ2File`` and ``lzma.LZMAFile`` drop what follows the first stream without an error if it is damaged.
"""

from __future__ import annotations

import bz2
import io
import lzma

BLOCK = 2**14


class StreamDamaged(Exception):
    """The bytes behind a stream are neither another stream nor padding."""


class StreamReader(io.RawIOBase):
    """The unpacked bytes of ``file``, one stream behind the other. Raises at any byte that belongs to no stream.

    ``decompressor`` is the class that unpacks one stream. Behind a stream of .xz, zeros in multiples of four are legal.
    """

    def __init__(self, file: io.BufferedIOBase, decompressor: type[bz2.BZ2Decompressor] | type[lzma.LZMADecompressor]):
        self.file = file
        self.decompressor = decompressor
        self.stream = decompressor()
        self.packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = b""
        while not data:
            if self.stream.eof and not self._next_stream():
                return 0
            packed = b""
            if self.stream.needs_input:
                packed, self.packed = self.packed or self.file.read(BLOCK), b""
                if not packed:
                    raise EOFError("the file ends before its last stream does")
            data = self.stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bool:
        """Begin the next stream; False at the end of the file."""
        packed = self.stream.unused_data or self.file.read(BLOCK)
        padding = 0
        while self.decompressor is lzma.LZMADecompressor and packed.startswith(b"\0"):
            rest = packed.lstrip(b"\0")
            padding += len(packed) - len(rest)
            packed = rest or self.file.read(BLOCK)
        if padding % 4:
            raise StreamDamaged(f"{padding} zeros follow a stream, but padding comes in multiples of four")
        self.packed = packed
        if packed:
            self.stream = self.decompressor()
        return bool(packed)
