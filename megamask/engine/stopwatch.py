"""The time that a device spends on a part of its work, without a synchronisation for each measurement."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Sums the time that ``device`` spends inside of ``with`` blocks."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        """Begin and end of each block, in turn: seconds, or events on a GPU, which are read when all have passed."""

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *_: object) -> None:
        self._mark()

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def take(self) -> float:
        """The seconds since the last call. Waits for the device."""
        marks, self._marks = self._marks, []
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if not self._on_gpu:
            return sum(end - begin for begin, end in pairs)
        if marks:
            marks[-1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
