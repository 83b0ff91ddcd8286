"""The environment of a Python process that this one starts to run megamask, and its end. Without torch."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import megamask

ROOT = Path(megamask.__file__).parent.parent
"""What Python imports megamask from; a checkout has its tests there."""
_LIBC = ctypes.CDLL(None)


def child_environment() -> dict[str, str]:
    """The environment of this process, in which a new Python imports megamask from the same folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}


def end_with_parent(number: int) -> None:
    """In a new process: receive signal ``number`` when its parent ends for any reason, killed or not.

    For `preexec_fn`; what is loaded here is not loaded between fork and exec.
    """
    _LIBC.prctl(1, number)  # PR_SET_PDEATHSIG
