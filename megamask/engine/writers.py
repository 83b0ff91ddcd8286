"""Which ranks write a checkpoint; without torch."""

from __future__ import annotations

MAX_WRITERS = 64
"""Most ranks that write a checkpoint. A start opens every file of one, so their number must not grow with the ranks."""
WINDOW = 2**26
"""Bytes of gathered tensors that each of them keeps at once while it saves, on average."""


def writing_ranks(world: int) -> list[int]:
    """The ranks that write a checkpoint: all of up to 64, else 64 at even distances, on as many nodes as possible."""
    count = min(world, MAX_WRITERS)
    return [number * world // count for number in range(count)]
