"""The versions of Python and PyTorch that megamask runs on.

Before 2.10 a file could run code even where only weights were asked for (CVE-2026-24747). megamask reads no pickles,
but its users do, beside it, and it needs 2.11 for its own sake. An installer keeps to that; a path put together by hand
does not. Costs a look into the metadata of the installed package.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import version

from megamask.errors import ConfigError

PYTHON = (3, 11), (3, 13)
"""The oldest and the newest."""
OLDEST = (2, 11)
"""PyTorch."""


def check_python(version: tuple[int, ...]) -> None:
    """End the process with exit code 2 if megamask does not run on this version of Python."""
    if not PYTHON[0] <= version <= PYTHON[1]:
        oldest, newest, this = (".".join(map(str, each)) for each in (*PYTHON, version))
        print(
            f"megamask runs on Python {oldest} to {newest}, but this is Python {this} ({sys.executable}). Use another, "
            "such as .venv/bin/python after `make pretrain`.",
            file=sys.stderr,
        )
        sys.exit(ConfigError.exit_code)


def check_torch() -> None:
    """ConfigError if PyTorch is older."""
    found = version("torch")
    said = re.match(r"(\d+)\.(\d+)", found)
    if not said or (int(said[1]), int(said[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(
            f"PyTorch must be {oldest} or newer, but is {found}. Install a newer one: pip install -U torch."
        )
