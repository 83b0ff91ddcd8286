"""transformers, imported when something is first asked of it.

That takes a second of every rank's start, and most launches of a run have no use for it.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    import transformers

    return getattr(transformers, name)
