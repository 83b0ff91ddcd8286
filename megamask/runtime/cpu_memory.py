"""Keep the memory of freed tensors in the process, so that the next step does not fetch it from the kernel again.

By default, glibc gives large blocks back when they are freed. The next tensor of the same size is new memory, which
the kernel fills with zeros page by page at its first use: about 3 microseconds for each 4 KiB on a virtual machine,
which made a matrix product with a result of 16 MiB 30 % slower. PyTorch caches memory itself only on a GPU.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3), from malloc.h."""
LARGEST_BLOCKS = (2**27, 2**25)
"""Bytes up to which a block comes from the heap, in the order of preference: before 2.35, glibc takes at most 2^25.

Larger blocks are weights, moments and copies of them: they go back when they are freed.
"""
LARGE_MODEL = 2**27
"""Weights from which on only blocks of up to 4 MiB stay in the heap.

Until 2.38, glibc cannot put an aligned block where one of the same size was freed. With blocks of 4 to 64 MiB, the
layers of a large model, the heap grew by 10 bytes per weight in three steps.
"""


def keep_freed_memory(num_weights: int = 0) -> bool:
    """Let the heap of this process keep what it frees, from now on; returns whether the C library can do this.

    The heap then stays at the size of the largest step until the process ends. The steps are those of a model of
    ``num_weights``.
    """
    if num_weights >= LARGE_MODEL:
        return _set_thresholds(mmap=2**22, trim=2**23)
    return any(_set_thresholds(mmap=size, trim=-1) for size in LARGEST_BLOCKS)


def return_large_blocks() -> bool:
    """Give back what is free, and from now on each block of 1 MiB or more when it is freed; before and after training.

    Otherwise copies of weights that exist only while a run is built, restored or exported would stay in the heap.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))
    return _set_thresholds(mmap=2**20, trim=2**20)


def return_freed_memory() -> bool:
    """Undo `keep_freed_memory`: set the thresholds that glibc itself chooses after a process has freed a large block.

    It then takes blocks of up to 32 MiB from the heap and gives back the end of the heap beyond 64 MiB.
    """
    return _set_thresholds(mmap=2**25, trim=2**26)


def _set_thresholds(mmap: int, trim: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, mmap)) and bool(mallopt(M_TRIM_THRESHOLD, trim))
