"""The library transformers, imported when one of its names is first used.

The import takes about a second on every rank, and most launches do not need it.
"""

from __future__ import annotations

from typing import Any

from megamask.runtime.accelerator import choose_accelerator


def __getattr__(name: str) -> Any:
    choose_accelerator()
    import transformers

    return getattr(transformers, name)
