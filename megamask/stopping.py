"""A signal to any rank stops all of them after the same step."""

from __future__ import annotations

import signal

import torch

from megamask import ranks


class Stop:
    """Whether somebody asked the run to stop: inside of this, a signal to any rank stops all after the same step."""

    def __enter__(self) -> Stop:
        self._asked = False
        names = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {name: signal.signal(name, self._ask) for name in names}
        return self

    def __exit__(self, *why: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True  # and nothing more: a handler that prints can die of it

    def agreed(self) -> bool:
        """Collective."""
        return bool(ranks.maximum(torch.tensor(float(self._asked))).item())
