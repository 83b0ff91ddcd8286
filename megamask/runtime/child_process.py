"""The environment of a Python process that this one starts to run megamask. Without torch."""

from __future__ import annotations

import os
from pathlib import Path

import megamask

ROOT = Path(megamask.__file__).parent.parent
"""What Python imports megamask from; a checkout has its tests there."""


def child_environment() -> dict[str, str]:
    """The environment of this process, in which a new Python imports megamask from the same folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
