"""The versions of Python and PyTorch that megamask runs on.

Before PyTorch 2.10 a file could run code even with ``weights_only=True`` (CVE-2026-24747). megamask reads no pickles,
but other code in the same environment may, and megamask needs 2.11 anyway. An installer ensures that; a search path
that was put together by hand does not. The check reads the metadata of the installed package.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version

from megamask.errors import ConfigError

PYTHON = (3, 11), (3, 13)
"""The oldest and the newest supported version."""
OLDEST = (2, 11)
"""The oldest supported version of PyTorch."""


def installed_version(library: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def check_python(version: tuple[int, ...]) -> None:
    """End the process with exit code 2 if megamask does not support this version of Python."""
    if not PYTHON[0] <= version <= PYTHON[1]:
        oldest, newest, this = (".".join(map(str, each)) for each in (*PYTHON, version))
        print(
            f"megamask runs on Python {oldest} to {newest}, but this is Python {this} ({sys.executable}). Use another "
            "version, such as .venv/bin/python after `make pretrain`.",
            file=sys.stderr,
        )
        sys.exit(ConfigError.exit_code)


def check_torch() -> None:
    """Raise ConfigError if PyTorch is too old."""
    installed = version("torch")
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if not numbers or (int(numbers[1]), int(numbers[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(
            f"PyTorch must be {oldest} or newer, but is {installed}. Install a newer one: pip install -U torch."
        )
