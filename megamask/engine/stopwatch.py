"""The seconds that a device spends on some of its work, without waiting for it at each piece."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Adds up what passes on ``device`` inside of ``with`` blocks."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        """Beginnings and ends in turn: on a GPU events, of which the times are read when all are past."""

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
        """The seconds since the last call, and start again. Waits for the device."""
        marks, self._marks = self._marks, []
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if not self._on_gpu:
            return sum(end - begin for begin, end in pairs)
        if marks:
            marks[-1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
