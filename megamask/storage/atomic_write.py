"""Durable files: this module does every write and rename that must survive a crash.

`write_file`, `make_folder`, `rename`, `sync` and `remove` are the only operations, so that a test can record them, let
one of them fail, or simulate a power cut between any two. `write_atomic` and `atomic_folder` combine them. A file is
durable once it and the folder that contains it are synced. This costs one fsync for each file and folder. A thread
hashes while the bytes are written, so the slower of the two sets the speed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megamask.storage.file_list import FileEntry

MAX_UNHASHED = 64
"""Blocks that may be written before they are hashed."""
VISIBILITY_TIMEOUT = 60.0
"""Seconds that a rank waits until it sees what another rank has written."""


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write ``chunks`` to a new file and sync it."""
    digest, size, hashing = hashlib.sha256(), 0, deque[Future]()
    with open(path, "xb") as file, ThreadPoolExecutor(1) as hasher:
        for chunk in chunks:
            hashing.append(hasher.submit(digest.update, chunk))
            if len(hashing) > MAX_UNHASHED:  # a block that waits to be hashed takes memory
                hashing.popleft().result()
            file.write(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
        for block in hashing:
            block.result()
    return FileEntry(size, digest.hexdigest())


def make_folder(folder: Path) -> None:
    """Make a new folder."""
    os.mkdir(folder)


def rename(old: Path, new: Path) -> None:
    """Rename a file or folder in one step. A file replaces the file ``new``, a folder only an empty folder."""
    os.rename(old, new)


def sync(path: Path) -> None:
    """Make the names in a folder durable, or the bytes of a file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Delete a folder as far as possible; the next launch removes the rest."""
    shutil.rmtree(folder, ignore_errors=True)


def write_atomic(path: Path, content: str | bytes | Iterable[bytes | memoryview]) -> FileEntry:
    """Write a whole file: readers see the old or the new content, also after a kill or a power cut."""
    content = content.encode() if isinstance(content, str) else content
    chunks = [content] if isinstance(content, bytes) else content
    temporary = beside(path, "tmp")
    temporary.unlink(missing_ok=True)
    try:
        entry = write_file(temporary, chunks)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return entry


@contextmanager
def atomic_folder(output: Path, temporary: Path | None = None) -> Iterator[Path]:
    """A new folder to write into, which becomes ``output`` at the end and replaces what was there.

    All its files are synced before that. After an error, ``output`` is as it was. ``temporary`` is the new folder, on
    the file system of ``output``; by default it is beside ``output``.
    """
    temporary = temporary or beside(output, "tmp")
    old = beside(output, "old")
    remove(temporary)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    make_folder(temporary)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in (*names, "."):
                sync(Path(folder) / name)
        if output.exists():
            rename(output, old)
        try:
            rename(temporary, output)
        except OSError:
            if old.exists() and not output.exists():  # else another process was first
                rename(old, output)
            remove(old)
            raise
        sync(output.parent)
    except BaseException:
        remove(temporary)
        raise
    remove(old)


def beside(path: Path, why: str) -> Path:
    """A hidden name beside ``path`` that belongs to this process."""
    return path.with_name(f".{why}-{path.name}-{os.getpid()}")


def is_visible(folder: Path) -> bool:
    """Whether this host sees ``folder``. A stale file handle means "not yet"."""
    try:
        return stat.S_ISDIR(os.stat(folder).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return False


def wait_until(condition: Callable[[], bool]) -> bool:
    """Wait until ``condition()`` is true; False after `VISIBILITY_TIMEOUT`. Shared file systems show changes late."""
    end = time.monotonic() + VISIBILITY_TIMEOUT
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
