"""A folder for files that one process needs while it runs, such as weights that do not fit into memory."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "megamask-scratch-"
LOCK = "lock"


class ScratchFolder:
    """A new folder in ``parent`` that `close` deletes.

    The process keeps a lock of the folder. A folder whose process was killed is deleted by the next one that makes a
    folder in ``parent``; where the file system has no locks, it stays. Raises OSError.
    """

    def __init__(self, parent: Path):
        parent.mkdir(parents=True, exist_ok=True)
        for other in parent.glob(f"{PREFIX}*"):
            _delete_if_abandoned(other)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
        self._lock = os.open(made / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        _try_lock(self._lock)
        # it gets the name that others look for when it is locked
        self.path = made.rename(parent / f"{PREFIX}{made.name.removeprefix('.new-')}")

    def close(self) -> None:
        """Delete the folder with its files."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _delete_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:  # being deleted by its owner, or of another user
        return
    if _try_lock(lock):
        shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _try_lock(handle: int) -> bool:
    """Whether this process has the lock now; False if another has it, or if the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
