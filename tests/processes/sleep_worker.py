"""A rank that hangs; it imports nothing slow, so that it has begun long before any patience ends."""

from __future__ import annotations

import time


def sleep() -> None:
    """Never ends."""
    print("asleep")
    time.sleep(600)
