"""Lets a rank wait at a step until something happens to it: what a test then does comes neither too early nor too late.

HOLD="5,9" holds every rank once before step 5 and once before step 9, whatever the restarts in between, until it gets
a signal or is killed. FAIL="7" lets the last rank end once before step 7 with the code 9. In the run folder, a file
for each rank says that it has come so far.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


def at(step: int, rank: int, world: int, run: Path) -> None:
    """To be called by every rank before each step, its handlers set."""
    if str(step) in os.environ.get("FAIL", "").split(",") and rank == world - 1 and first(run / f"failed-{step}"):
        print("boom", flush=True)
        sys.exit(9)
    if str(step) in os.environ.get("HOLD", "").split(","):
        if first(run / f"held-{step}-rank{rank}"):
            until_a_signal()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def first(file: Path) -> bool:
    """Whether ``file`` was not there; now it is."""
    existed = file.exists()
    file.touch()
    return not existed


def until_a_signal() -> None:
    """Wait for a signal, whose handler runs as usual."""
    came: list[int] = []

    def listen(number: int) -> None:
        usual = signal.getsignal(number)

        def handle(number: int, frame: object) -> None:
            came.append(number)
            if callable(usual):
                usual(number, frame)  # type: ignore[arg-type]

        signal.signal(number, handle)

    for number in SIGNALS:
        listen(number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # one that is pending comes now
    while not came:
        time.sleep(0.02)
