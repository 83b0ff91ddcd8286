"""Arrays in .npy files: saved whole, and mapped into memory; a header is looked at before numpy acts on it.

A header is Python text with a type and a shape. One that says "texts of no length, as many as there are" divides by
zero inside of numpy and takes the process with it (seen with 2.4), so what it says must be what the file holds.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def mapped(file: Path) -> Shaped[np.ndarray, ...]:
    """The array in ``file``, of which nothing is read before it is asked for. ValueError says why it is none."""
    with file.open("rb") as opened:
        version = np.lib.format.read_magic(opened)
        if version not in READERS:
            raise ValueError(f"its header is of version {version}")
        try:
            shape, _, kind = READERS[version](opened)
        except Exception as error:  # the parser raises of every kind
            raise ValueError(" ".join(str(error).split())[:200]) from None
        held = file.stat().st_size - opened.tell()
    if kind.hasobject or not kind.itemsize:
        raise ValueError(f"it would hold {kind}, which is no number")
    if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != held:
        raise ValueError(f"its header says {kind} in the shape {shape}, but {held} bytes follow")
    # a plain view: indexing a memmap object costs more than the read
    return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))


def rising(values: Int64[np.ndarray, " n"], *, strictly: bool = False) -> bool:
    """Whether no value is below the one before, or each is above it. No difference is formed, which might overflow."""
    before, after = values[:-1], values[1:]
    return bool((after > before).all() if strictly else (after >= before).all())


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file that is whole or absent, also after a crash."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
