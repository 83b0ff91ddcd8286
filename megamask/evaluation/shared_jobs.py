"""Several processes that evaluate into one folder: one of them computes each job, and one at a time writes the table.

A job belongs to the process that holds its lock, a hidden file beside its cells. A process whose other jobs are done
waits for jobs of others, and takes over those of a process that was killed. So all cells are there when it ends.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megamask.errors import LockError
from megamask.evaluation.jobs import Job
from megamask.storage.lock import Lock

POLL = 1.0
"""Seconds between two attempts to get a lock."""


class SharedJobs:
    """The jobs of a command that nobody has computed yet."""

    def __init__(self, jobs: Sequence[Job], cell_of: Callable[[Job], Path], is_done: Callable[[Job], bool]):
        """``cell_of`` gives the file of the first cell of a job. ``is_done`` looks whether that is there now."""
        self._left, self._cell_of, self._is_done = list(jobs), cell_of, is_done
        self._launch, self._locks, self._announced = secrets.token_hex(4), dict[Job, Lock](), set[Job]()
        self._busy = dict[Job, LockError]()
        self.of_others: list[Job] = []
        """The jobs that another process has computed since."""

    def take(self) -> Job | None:
        """A job that this process must compute, or None if others compute all that are left."""
        for job in list(self._left):
            path = self._path(job)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock = Lock(path, self._launch)
            except LockError as error:
                self._busy[job] = error
                continue
            self._left.remove(job)
            self._locks[job] = lock
            if not self._is_done(job):
                return job
            self.of_others.append(job)
            self.finish(job)
        return None

    def finish(self, job: Job) -> None:
        """Release the lock of ``job``, whose cells are written."""
        # a process that waits for the lock looks for the cell before it computes
        self._path(job).unlink(missing_ok=True)
        self._locks.pop(job).close()

    @property
    def left(self) -> int:
        """The number of jobs that nobody has computed and this process has not taken."""
        return len(self._left)

    def wait(self) -> None:
        """Wait a moment for the jobs of other processes, and print once which they are."""
        for job in self._left:
            if job not in self._announced:
                print(f"Waiting for the result of {job.name}. {self._busy[job]}", file=sys.stderr)
                self._announced.add(job)
        time.sleep(POLL)

    def close(self) -> None:
        """Release all locks."""
        for job in list(self._locks):
            self.finish(job)

    def _path(self, job: Job) -> Path:
        cell = self._cell_of(job)
        return cell.with_name(f".{cell.stem}.lock")


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Wait until no other process writes the table of ``output``, and keep others waiting during the block."""
    announced = False
    while True:
        try:
            lock = Lock(output / "lock", secrets.token_hex(4))
            break
        except LockError as busy:
            if not announced:
                print(busy, file=sys.stderr)
            announced = True
            time.sleep(POLL / 10)
    try:
        yield
    finally:
        lock.close()
