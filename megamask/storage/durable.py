"""Durable files: every operation on which the safety of a checkpoint rests goes through this module.

``write``, ``make``, ``rename``, ``sync`` and ``remove`` are all there is, so that a test can record them, make one
of them fail, or cut the power between any two. A file is durable once it and the folder that names it are synced.
Costs one fsync for each file or folder; a thread hashes while the bytes go out, so of hashing and writing the slower
one counts.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megamask.errors import LockError

BLOCK = 1 << 22
AHEAD = 64
"""Blocks that may be written before they are hashed."""
PATIENCE = 60.0
"""Seconds that a rank waits for what another rank made to become visible."""


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written: its name, its size in bytes, its sha256."""

    name: str
    size: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write ``chunks`` to a new file at ``path``, hashing on the way; the bytes are on the disk on return."""
    digest, size, hashing = hashlib.sha256(), 0, deque[Future]()
    with open(path, "xb") as file, ThreadPoolExecutor(1) as hasher:
        for chunk in chunks:
            hashing.append(hasher.submit(digest.update, chunk))
            if len(hashing) > AHEAD:  # a block that waits to be hashed holds memory
                hashing.popleft().result()
            file.write(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
        for block in hashing:
            block.result()
    return FileEntry(path.name, size, digest.hexdigest())


def make_folder(folder: Path) -> None:
    """Make a new folder."""
    os.mkdir(folder)


def rename(old: Path, new: Path) -> None:
    """Give a file or folder another name in one step."""
    os.rename(old, new)


def sync(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Delete a folder as far as that goes; what remains is swept up by the next launch."""
    shutil.rmtree(folder, ignore_errors=True)


def replace(path: Path, text: str) -> None:
    """Let ``path`` hold ``text``: readers see the old or the new text, whole, whenever the power goes."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        write_file(temporary, [text.encode()])
        rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish_folder(folder: Path) -> bool:
    """Whether this host sees ``folder``. A stale handle is an old view of it, no answer yet."""
    try:
        return stat.S_ISDIR(os.stat(folder).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return False


def wait_for_file(until: Callable[[], bool]) -> bool:
    """Ask again and again until it is so; False after ``PATIENCE`` seconds. Shared file systems show things late."""
    end = time.monotonic() + PATIENCE
    while not until():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def sha256(path: Path) -> str:
    """The sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class Lock:
    """One writer for a folder: refused while another lives, taken over when that one is dead.

    The operating system's lock says who lives, where the file system has it. Elsewhere the process id does on this
    host, and on another host a requeued Slurm job knows its own earlier self. ``held`` also tells a writer that
    slept through a take-over.
    """

    def __init__(self, path: Path, launch: str):
        self.path, self.launch = path, launch
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self.handle)
            raise

    def _take(self) -> None:
        owner = self._owner()
        me = {"launch": self.launch, "pid": os.getpid(), "host": socket.gethostname()}
        me["job"] = os.environ.get("SLURM_JOB_ID", "")
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            free = not owner or _dead(owner, me)
        if not free:
            raise LockError(
                f"{self.path.parent} is being written by process {owner.get('pid', '?')} on {owner.get('host', '?')} "
                f"(launch {owner.get('launch', '?')}). Wait for it or stop it, or choose another output folder; "
                f"if it is gone for certain, delete {self.path.name}."
            )
        self._write(json.dumps(me))

    def held(self) -> bool:
        """Whether the folder is still ours: nobody took the lock over or deleted it."""
        return holds(self.path, self.launch)

    def close(self) -> None:
        """Let others write."""
        try:
            if self.held():
                self._write("")
        except OSError:
            pass  # the end of the process frees it
        finally:
            os.close(self.handle)

    def _owner(self) -> dict:
        try:
            owner = json.loads(os.pread(self.handle, 4096, 0) or b"{}")
        except (ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _write(self, text: str) -> None:
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, text.encode(), 0)


def holds(lock: Path, launch: str) -> bool:
    """Whether the lock file still names ``launch``. OSError if the storage does not answer, which says nothing."""
    try:
        return json.loads(lock.read_bytes())["launch"] == launch
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _dead(owner: dict, me: dict) -> bool:
    if owner.get("host") != me["host"]:
        return bool(me["job"]) and owner.get("job") == me["job"]
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError, TypeError):
        return False
    return False
