"""Arrays in .npy files: saved atomically, and mapped into memory after a check of the header.

A header is Python text with a type and a shape. With a type of zero bytes and a negative length, numpy divides by zero
and the process dies (seen with 2.4), so a header must describe exactly the bytes that follow.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64, Shaped

from megamask.storage.atomic_write import write_atomic
from megamask.storage.file_list import BLOCK, FileEntry

READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def map_array(file: Path) -> Shaped[np.ndarray, ...]:
    """The array in ``file``, memory-mapped and read-only; opens the file once. Raises ValueError with the reason."""
    with file.open("rb") as opened:
        version = np.lib.format.read_magic(opened)
        if version not in READERS:
            raise ValueError(f"its header is of version {version}")
        try:
            shape, by_columns, kind = READERS[version](opened)
        except Exception as error:  # the parser raises errors of many kinds
            raise ValueError(" ".join(str(error).split())[:200]) from None
        begin = opened.tell()
        following = os.fstat(opened.fileno()).st_size - begin
        if kind.hasobject or not kind.itemsize:
            raise ValueError(f"its type is {kind}, which is not numeric")
        if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != following:
            raise ValueError(f"its header says {kind} in the shape {shape}, but {following} bytes follow")
        # a plain view: indexing a memmap object costs more than the read
        order: Literal["F", "C"] = "F" if by_columns else "C"
        return np.asarray(np.memmap(opened, kind, mode="r", offset=begin, shape=shape, order=order))


def is_increasing(values: Int64[np.ndarray, " n"], *, strictly: bool = False) -> bool:
    """Whether each value is at least the one before, or ``strictly`` above it. Differences could overflow."""
    before, after = values[:-1], values[1:]
    return bool((after > before).all() if strictly else (after >= before).all())


def save_array(path: Path, array: np.ndarray) -> FileEntry:
    """Write a .npy file atomically, with the same bytes as `np.save`."""
    return write_atomic(path, _npy_bytes(np.ascontiguousarray(array)))


def _npy_bytes(array: np.ndarray) -> Iterator[bytes | memoryview]:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    yield header.getvalue()
    data = array.reshape(-1).view(np.uint8).data
    for begin in range(0, len(data), BLOCK):
        yield data[begin : begin + BLOCK]
