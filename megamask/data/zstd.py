"""Reading .zst files as a stream that does not take a cut file for a whole one."""

from __future__ import annotations

import io

import zstandard

BLOCK = 2**17


class ZstdTruncated(Exception):
    """The file ends inside a frame, or holds no frame."""


class ZstdReader(io.RawIOBase):
    """The unpacked bytes of ``file``, one frame behind the other."""

    def __init__(self, file: io.BufferedIOBase):
        self.file = file
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.has_begun = False
        self.packed = self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready and self._unpack():
            pass
        given = self.ready[: len(buffer)]
        self.ready = self.ready[len(given) :]
        buffer[: len(given)] = given
        return len(given)

    def _unpack(self) -> bool:
        """Unpack the next block; False at the end of the file."""
        self.packed = self.packed or self.file.read(BLOCK)
        if not self.packed:
            if self.has_begun:
                raise ZstdTruncated("the file ends before its last frame does")
            return False
        try:
            self.ready = self.frame.decompress(self.packed)
        except zstandard.ZstdError as error:
            raise ZstdTruncated(str(error)) from None
        self.has_begun, self.packed = True, b""
        if self.frame.eof:
            self.packed = self.frame.unused_data
            self.frame, self.has_begun = zstandard.ZstdDecompressor().decompressobj(), False
        return True

    def close(self) -> None:
        self.file.close()
        super().close()
