"""Work that outlives a kill: a folder of what is finished, and processes that end with the one that made them."""

from __future__ import annotations

import ctypes
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
from megamask.runtime.entry_point import full_disk, make_output_safe


class _Process(SpawnProcess):
    """A worker that leaves signals to its parent, which a terminal and a batch system send to both of them."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            super().start()  # it inherits what is blocked
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Spawn(SpawnContext):
    Process = _Process  # type: ignore[assignment]


SPAWN = _Spawn()
"""Processes start afresh: a fork would copy the locks that other threads of this one may hold."""


@contextmanager
def folder(work: Path, identity: str, output: Path) -> Iterator[Path]:
    """The folder ``work`` of what is finished of this request for ``output``; another request's is emptied.

    It is removed at the end, and stays if what is done inside fails. DataError if another process works in it;
    StorageError, which says what stays, if the disk is full.
    """
    try:
        with _held(work, identity, output):
            yield work
    except MegamaskError:
        raise
    except Exception as error:
        if not (reason := full_disk(error)):
            raise
        sentence = f"{output} cannot be written: {reason}."
        if _something_finished(work):
            sentence += f" What is finished stays in {work}. Make room: the same command goes on from there."
        else:
            shutil.rmtree(work, ignore_errors=True)
        raise StorageError(sentence) from None


def _something_finished(work: Path) -> bool:
    """Whether a file is there besides what each request begins with and what was being written."""
    inside = (file.relative_to(work) for file in work.rglob("*") if file.is_file())
    return any(not file.parts[0].startswith(".tmp-") and file.parts[0] not in ("lock", "request") for file in inside)


@contextmanager
def _held(work: Path, identity: str, output: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
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
            stop.add_note("The same command goes on from here.")
            raise
    shutil.rmtree(work)


@contextmanager
def processes(count: int, start: Callable[..., None], *given: Any) -> Iterator[Executor]:
    """That many worker processes, of which each calls ``start`` with what is ``given`` first.

    After an error of one, or of the caller, all are killed. DataError if one is killed. They end with this process,
    however it ends.
    """
    with ProcessPoolExecutor(count, SPAWN, _start, (os.getpid(), start, *given)) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise DataError(
                "A worker process was killed, perhaps for want of memory. Start again with fewer `workers`: what is "
                "finished is kept."
            ) from None
        except BaseException:
            for worker in active_children():  # Python 3.14 has `pool.kill_workers`
                worker.kill()
            raise


def _start(parent: int, start: Callable[..., None], *given: Any) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the kernel ends this process with its parent
    if os.getppid() != parent:
        os._exit(1)  # it ended before that
    make_output_safe()
    start(*given)
