"""The loader: packs made ready by one background thread while the device computes.

A pack takes well under a millisecond, so one thread keeps up and no worker process is needed. On a GPU the thread
pins the memory and the copy does not block. ``waited`` counts the seconds in which the caller stood idle.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator

import torch
from torch import Tensor

from megamask.batch import PackedBatch
from megamask.data.packs import Packs

AHEAD = 4


class Loader:
    """Batches of ``packs`` on ``device``, read ahead."""

    def __init__(self, packs: Packs, device: torch.device | str = "cpu"):
        self.packs, self.device = packs, torch.device(device)
        self.waited = 0.0
        """Seconds that the caller has waited for batches, since the loader was made."""

    def batch(self, number: int) -> PackedBatch:
        """Pack ``number``, read now."""
        return next(self.batches([number]))

    def batches(self, numbers: Iterable[int]) -> Generator[PackedBatch, None, None]:
        """The packs of ``numbers``, in their order. An error in the thread is raised here, at its batch."""
        ready: queue.Queue = queue.Queue(AHEAD)
        stop = threading.Event()
        thread = threading.Thread(target=self._read, args=(iter(numbers), ready, stop), name="loader", daemon=True)
        thread.start()
        try:
            while True:
                asked = time.perf_counter()
                batch, error = ready.get()
                self.waited += time.perf_counter() - asked
                if error is not None:
                    raise error
                if batch is None:
                    return
                yield batch.each(lambda t: t.to(self.device, non_blocking=True))
        finally:
            stop.set()
            while thread.is_alive():
                # make room, or the thread would wait for it
                while not ready.empty():
                    ready.get_nowait()
                thread.join(0.01)

    def _read(self, numbers: Iterator[int], ready: queue.Queue, stop: threading.Event) -> None:
        try:
            for number in numbers:
                batch = self.packs.batch(number)
                if self.device.type == "cuda":
                    batch = batch.each(Tensor.pin_memory)
                ready.put((batch, None))
                if stop.is_set():
                    return
            ready.put((None, None))
        except Exception as error:  # to be raised where it can be caught
            ready.put((None, error))
