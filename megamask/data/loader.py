"""The loader: one background thread reads packs while the device computes.

A pack takes much less than a millisecond, so one thread is fast enough and no worker process is needed. For a GPU the
thread pins the memory, so the copy does not block. ``waited`` counts the seconds that the caller waited.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator

import torch
from torch import Tensor

from megamask.batch import PackedBatch
from megamask.data.mixed_sources import TextPacks

QUEUE_SIZE = 4
"""Packs that are read before they are requested."""


class Loader:
    """Batches of ``packs`` on ``device``, read ahead."""

    def __init__(self, packs: TextPacks, device: torch.device | str = "cpu"):
        self.packs, self.device = packs, torch.device(device)
        self.waited = 0.0
        """Seconds that the caller has waited for batches so far."""

    def batch(self, number: int) -> PackedBatch:
        """Pack ``number``."""
        return next(self.batches([number]))

    def batches(self, numbers: Iterable[int]) -> Generator[PackedBatch, None, None]:
        """The packs of ``numbers``, in order. An error in the thread is raised here, at its batch."""
        ready: queue.Queue = queue.Queue(QUEUE_SIZE)
        stop = threading.Event()
        thread = threading.Thread(target=self._read, args=(iter(numbers), ready, stop), name="loader", daemon=True)
        thread.start()
        try:
            while True:
                start = time.perf_counter()
                batch, error = ready.get()
                self.waited += time.perf_counter() - start
                if error is not None:
                    raise error
                if batch is None:
                    return
                yield batch.map_tensors(lambda t: t.to(self.device, non_blocking=True))
        finally:
            stop.set()
            while thread.is_alive():
                # empty the queue, or the thread waits for space
                while not ready.empty():
                    ready.get_nowait()
                thread.join(0.01)

    def _read(self, numbers: Iterator[int], ready: queue.Queue, stop: threading.Event) -> None:
        try:
            for number in numbers:
                batch = self.packs.batch(number)
                if self.device.type == "cuda":
                    batch = batch.map_tensors(Tensor.pin_memory)
                ready.put((batch, None))
                if stop.is_set():
                    return
            ready.put((None, None))
        except Exception as error:  # raised again in the caller
            ready.put((None, error))
