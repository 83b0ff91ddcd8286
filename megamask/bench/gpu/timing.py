"""Seconds and bytes of work on a device."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from megamask.bench.gpu.figures import NEEDS_CUDA, Figure
from megamask.bench.gpu.parts import error_text

SYNC_WARNING = "synchronizing CUDA operation"
Measurement = tuple[str, Callable[[], Iterable[Figure]]]
"""A name for the error, and what gives the figures."""


def each(measurements: Iterable[Measurement]) -> Iterator[Figure]:
    """The figures of all; one that fails gives a figure with its error, and the next goes on."""
    for name, measure in measurements:
        try:
            yield from measure()
        except Exception as error:  # any library may fail on a device that it was never tried on
            yield Figure(name, error=error_text(error))
        release_memory()


def release_memory() -> None:
    """Give memory of the device that nothing uses any more back to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds_of(work: Callable[[], object], repeats: int = 20, warm_up: int = 3) -> float:
    """The median of the seconds that a device takes for ``work``, after some calls that are not measured."""
    for _ in range(warm_up):
        work()
    if not torch.cuda.is_available():
        return statistics.median(_clocked(work) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairwise(marks)) / 1000


def _clocked(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@dataclass
class PeakMemory:
    """Bytes that are allocated on the device at the peak of a ``with`` block, beyond those before it."""

    bytes: int | None = None
    """None without CUDA."""

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self._before

    def figure(self, name: str) -> Figure:
        """As a figure."""
        return Figure(name, self.bytes, "B", error="" if self.bytes is not None else NEEDS_CUDA)


def count_waits(work: Callable[[], object], calls: int) -> int:
    """How often the host waits for the device during ``calls`` of ``work``, as torch reports it. Needs CUDA."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(calls):
                work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(SYNC_WARNING in str(each.message) for each in caught)
