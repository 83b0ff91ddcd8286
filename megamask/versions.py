"""The oldest PyTorch that files may be read with.

Before 2.10 a file could run code even where only weights were asked for (CVE-2026-24747). megamask reads no pickles,
but its users do, beside it, and it needs 2.11 for its own sake. An installer keeps to that; a path put together by hand
does not. Costs a look into the metadata of the installed package.
"""

from __future__ import annotations

import re
from importlib.metadata import version

from megamask.errors import ConfigError

OLDEST = (2, 11)


def check() -> None:
    """ConfigError if PyTorch is older."""
    found = version("torch")
    said = re.match(r"(\d+)\.(\d+)", found)
    if not said or (int(said[1]), int(said[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(
            f"PyTorch must be {oldest} or newer, but is {found}. Install a newer one: pip install -U torch."
        )
