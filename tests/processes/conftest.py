"""Runs a function in several processes that know each other, as a launcher would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes.server import Place, Server, environment, free_port

RunRanks = Callable[..., list[Any]]


@pytest.fixture
def run_ranks(server: Server, tmp_path: Path) -> RunRanks:
    """``run_ranks(world, "module:function", timeout=120, **kwargs)``: what the function returned on each rank.

    The module lies in tests/processes/ or is importable from the root of the project; ``kwargs`` and answers are
    JSON. A rank that fails, or a ``timeout`` in seconds, kills all and raises AssertionError with what each printed.
    """

    def run(world: int, target: str, *, timeout: float = 120, **kwargs: object) -> list[Any]:
        port = free_port()
        folder = tmp_path / f"ranks-{port}"
        folder.mkdir()
        places = [
            Place(environment(rank, world, port), str(folder), f"{folder}/{rank}.log", f"{folder}/{rank}.json")
            for rank in range(world)
        ]
        codes, ended = wait(server, server.start(target, kwargs, places), timeout)
        if any(codes):
            why = "a rank failed" if ended else f"the ranks did not end within {timeout:g} s"
            raise AssertionError(f"{target} with {world} ranks: {why}\n" + report(codes, places))
        return [json.loads(Path(place.answer).read_text()) for place in places]

    return run


def wait(server: Server, pids: list[int], timeout: float, grace: float = 5) -> tuple[list[int], bool]:
    """The exit code of each (negative: the signal), and whether all ended in time, or one failed; the others of that
    one have ``grace`` seconds to say why. Who has not ended then is killed, with whatever it started."""
    end, statuses = time.monotonic() + timeout, dict[int, int]()
    while len(statuses) < len(pids) and (one := server.ended(max(0.0, end - time.monotonic()))):
        statuses[one[0]] = one[1]
        if one[1] and list(statuses.values()).count(0) == len(statuses) - 1:  # the first that failed
            end = min(end, time.monotonic() + grace)
    ended = len(statuses) == len(pids) or any(statuses.values())
    for number, pid in enumerate(pids):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if number not in statuses:
            os.kill(pid, signal.SIGKILL)  # it may not have a group of its own yet
    while len(statuses) < len(pids) and (one := server.ended()):
        statuses[one[0]] = one[1]
    return [statuses[number] for number in range(len(pids))], ended


def report(codes: list[int], places: list[Place]) -> str:
    """What each rank printed, and the exit code with which it ended (negative: the signal)."""
    return "\n".join(
        f"--- rank {number}, exit code {code}\n{Path(place.log).read_text(errors='replace')}"
        for number, (code, place) in enumerate(zip(codes, places, strict=True))
    )
