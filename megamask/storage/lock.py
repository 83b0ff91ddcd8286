"""The lock of a folder: one launch writes, and another takes over only when that one is dead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from megamask.errors import LockError


class Lock:
    """The right to write to a folder. Refused while its owner is alive, taken over when the owner is dead.

    The lock of the operating system decides, where the file system has it. Elsewhere the process id decides on this
    host, and on another host a requeued Slurm job recognizes its own earlier launch. ``is_held`` shows a writer that
    was suspended whether another has taken over.
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
            free = not owner or _is_dead(owner, me)
        if not free:
            raise LockError(
                f"{self.path.parent} is being written by process {owner.get('pid', '?')} on {owner.get('host', '?')} "
                f"(launch {owner.get('launch', '?')}). Wait for it or stop it, or choose another output folder. If it "
                f"is certainly gone, delete {self.path.name}."
            )
        self._write(json.dumps(me))

    def is_held(self) -> bool:
        """Whether the folder still belongs to this launch: nobody took the lock over or deleted it."""
        return names_launch(self.path, self.launch)

    def close(self) -> None:
        """Let others write."""
        try:
            if self.is_held():
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


def names_launch(lock: Path, launch: str) -> bool:
    """Whether the lock file names ``launch``. OSError if the storage does not answer, which proves nothing."""
    try:
        return json.loads(lock.read_bytes())["launch"] == launch
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _is_dead(owner: dict, me: dict) -> bool:
    if owner.get("host") != me["host"]:
        return bool(me["job"]) and owner.get("job") == me["job"]
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError, TypeError):
        return False
    return False
