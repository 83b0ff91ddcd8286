"""Progress of long work, with its rate and the time left: a bar on a terminal, lines elsewhere.

The lines go to stderr: the first after 10 seconds, then at intervals that double up to 5 minutes. An update reads the
clock once.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

FIRST, LONGEST = 10.0, 300.0
"""Seconds before the first line, and the longest interval between two lines."""
LARGE = 10_000
"""The bar shows counts from here on with a suffix (12.3k)."""


class ProgressBar:
    """Context manager that shows how many of ``total`` units of work are done.

    ``done`` units were finished by an earlier run and do not count for the rate. ``total`` is None if it is unknown.
    Output that cannot be written is dropped, so that it does not stop the work.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "step",
        *,
        done: int = 0,
        now: Callable[[], float] = time.monotonic,
    ):
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._stream = sys.stderr
        self._now, self._start, self._before = now, now(), done
        self._next, self._interval = self._start + FIRST, FIRST
        self._bar: tqdm | None = None
        with suppress(OSError, ValueError):  # a closed stream has no isatty
            if self._stream.isatty():
                self._bar = tqdm(
                    desc=label, total=total, initial=done, unit=unit, file=self._stream,
                    unit_scale=total is None or total >= LARGE,
                )  # fmt: skip

    def update(self, count: int = 1) -> None:
        """Add ``count`` finished units. 0 is allowed: it only shows a line that is due."""
        self.done += count
        if self._bar is not None:
            self._show_bar(count)
        elif self._now() >= self._next:
            self._write(self._line())
            self._interval = min(2 * self._interval, LONGEST)
            self._next = self._now() + self._interval

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield ``items``. Each is one unit of work, finished when the next one is requested."""
        for item in items:
            yield item
            self.update()

    def move_to(self, done: int) -> None:
        """Set the number of finished units."""
        self.update(done - self.done)

    def close(self) -> None:
        """Close the bar; without a terminal, print how long the work took if it took long enough for a line."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()
        elif self._now() - self._start >= FIRST:
            seconds = tqdm.format_interval(self._now() - self._start)
            self._write(f"{self.label}: {self._count(self.done)} {self.unit}s, ended after {seconds}")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _show_bar(self, count: int) -> None:
        assert self._bar is not None
        with suppress(OSError, ValueError):
            self._bar.update(count) if count else self._bar.refresh()

    def _line(self) -> str:
        seconds, new = self._now() - self._start, self.done - self._before
        rate = new / seconds if seconds > 0 else 0.0
        if self.total is None:
            count = f"{self._count(self.done)} {self.unit}s"
        else:
            share = f" ({self.done / self.total:.0%})" if self.total else ""
            count = f"{self._count(self.done)} of {self._count(self.total)} {self.unit}s{share}"
        if not new:
            return f"{self.label}: {count}, {tqdm.format_interval(seconds)} so far"
        per_second = self._count(rate) if rate >= 100 else f"{rate:.3g}"
        left = "" if self.total is None else f", ETA {tqdm.format_interval(max(0, self.total - self.done) / rate)}"
        return f"{self.label}: {count}, {per_second} {self.unit}s/s{left}"

    def _count(self, number: float) -> str:
        return f"{number:,.0f}"

    def _write(self, line: str) -> None:
        with suppress(OSError, ValueError):
            print(line, file=self._stream, flush=True)


@contextmanager
def elapsed(label: str) -> Iterator[None]:
    """Print the elapsed time of work that has no units to count.

    A thread prints the lines at the times of a ProgressBar without a terminal.
    """
    start, ended = time.monotonic(), threading.Event()

    def report() -> None:
        interval = FIRST
        while not ended.wait(interval):
            with suppress(OSError, ValueError):
                seconds = tqdm.format_interval(time.monotonic() - start)
                print(f"{label}: {seconds} so far", file=sys.stderr, flush=True)
            interval = min(2 * interval, LONGEST)

    reporter = threading.Thread(target=report, name="elapsed", daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()
