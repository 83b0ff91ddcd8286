"""Work that survives a kill: a folder of finished work, and worker processes that end with their parent."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from megamask.errors import DataError, MegamaskError, StorageError
from megamask.runtime.child_process import end_with_parent
from megamask.runtime.entry_point import full_disk, make_output_safe


class _Process(SpawnProcess):
    """A worker that ignores signals. A terminal and a batch system send them to the parent too, which handles them."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            super().start()  # it inherits the blocked signals
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Spawn(SpawnContext):
    Process = _Process  # type: ignore[assignment]


SPAWN = _Spawn()
"""New processes are spawned: a fork would copy locks that other threads may have acquired."""


@contextmanager
def folder(work: Path, identity: str, output: Path) -> Iterator[Path]:
    """The folder ``work`` for finished parts of ``output``. If it belongs to another ``identity``, it is emptied first.

    It is deleted at the end, and stays after an error. Raises DataError if another process works in it, and
    StorageError, which says whether finished work stays, if the disk is full.
    """
    try:
        with _locked(work, identity, output):
            yield work
    except MegamaskError:
        raise
    except Exception as error:
        if not (reason := full_disk(error)):
            raise
        sentence = f"{output} cannot be written: {reason}."
        if _something_finished(work):
            sentence += f" Finished work stays in {work}. Free some space, then run the same command to continue."
        else:
            shutil.rmtree(work, ignore_errors=True)
        raise StorageError(sentence) from None


def _something_finished(work: Path) -> bool:
    """Whether there is a finished file: not the lock, the request or a file that was being written."""
    inside = (file.relative_to(work).parts for file in work.rglob("*") if file.is_file())
    return any(
        parts[0] not in ("lock", "request") and not any(part.startswith(".tmp-") for part in parts) for parts in inside
    )


@contextmanager
def _locked(work: Path, identity: str, output: Path) -> Iterator[None]:
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock_file = (work / "lock").open("w")
    except OSError as error:
        if full_disk(error):
            raise
        raise StorageError(f"{output} cannot be written: {error.strerror}. Choose another output folder.") from None
    with lock_file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{output} is being written by another process. Wait for it.") from None
        request = work / "request"
        if not request.exists() or request.read_text() != identity:
            for leftover in work.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != "lock":
                    leftover.unlink()
            request.write_text(identity)
        try:
            yield
        except KeyboardInterrupt as stop:
            stop.add_note("The same command continues from here.")
            raise
    shutil.rmtree(work)


@contextmanager
def processes(count: int, start: Callable[..., None], *arguments: Any) -> Iterator[Executor]:
    """``count`` worker processes, each of which first calls ``start(*arguments)``.

    After an error in one of them or in the caller, all are killed. DataError if one is killed. They end when this
    process ends, even if it is killed.
    """
    with ProcessPoolExecutor(count, SPAWN, _start, (os.getpid(), start, *arguments)) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise DataError(
                "A worker process was killed, perhaps because memory ran out. Start again with fewer `workers`: "
                "finished work is kept."
            ) from None
        except BaseException:
            for worker in active_children():  # Python 3.14 has `pool.kill_workers`
                worker.kill()
            raise


def _start(parent: int, start: Callable[..., None], *arguments: Any) -> None:
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before
    make_output_safe()
    start(*arguments)
