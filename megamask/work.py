"""Work that outlives a kill: a folder of what is finished, and processes that end with the one that made them."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamask.errors import DataError

SPAWN = multiprocessing.get_context("spawn")
"""Processes start afresh: a fork would copy the locks that other threads of this one may hold."""


@contextmanager
def folder(work: Path, identity: str, output: Path) -> Iterator[Path]:
    """The folder ``work`` of what is finished of this request for ``output``; another request's is emptied.

    It is removed at the end, and stays if what is done inside fails. DataError if another process works in it.
    """
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
        yield work
    shutil.rmtree(work)


@contextmanager
def processes(count: int, start: Callable[..., None], *given: Any) -> Iterator[Executor]:
    """That many worker processes, of which each calls ``start`` with what is ``given`` first.

    After an error of one, or of the caller, no further work is begun. DataError if one is killed.
    """
    with ProcessPoolExecutor(count, SPAWN, _start, (start, *given)) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise DataError(
                "A worker process was killed, perhaps for want of memory. Start again with fewer `workers`: what is "
                "finished is kept."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(start: Callable[..., None], *given: Any) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    start(*given)
