"""Runs a function in several processes that know each other, as a launcher would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
RunRanks = Callable[..., list[Any]]

CHILD = """
import importlib, json, sys
target, arguments, answer = sys.argv[1:]
module, function = target.split(":")
said = getattr(importlib.import_module(module), function)(**json.loads(arguments))
with open(answer, "w") as file:
    json.dump(said, file)
from megamask import ranks
ranks.end(0)
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables by which `torchrun` tells a process who it is."""
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",  # what a killed rank had printed is kept
    }


@pytest.fixture
def run_ranks(tmp_path: Path) -> RunRanks:
    """``run_ranks(world, "module:function", timeout=120, **kwargs)``: what the function returned on each rank.

    The module lies in tests/processes/ or is importable from the root of the project; ``kwargs`` and answers are
    JSON. A rank that fails, or a ``timeout`` in seconds, kills all and raises AssertionError with what each printed.
    """

    def run(world: int, target: str, *, timeout: float = 120, **kwargs: object) -> list[Any]:
        port = free_port()
        folder = tmp_path / f"ranks-{port}"
        folder.mkdir()
        answers = [folder / f"{rank}.json" for rank in range(world)]
        logs = [folder / f"{rank}.log" for rank in range(world)]
        ranks: list[subprocess.Popen] = []
        try:
            for rank in range(world):
                with logs[rank].open("wb") as log:
                    command = [sys.executable, "-c", CHILD, target, json.dumps(kwargs), str(answers[rank])]
                    ranks.append(
                        subprocess.Popen(
                            command,
                            cwd=folder,
                            env=environment(rank, world, port),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,  # so that a kill takes its children too
                        )
                    )
            ended = wait(ranks, timeout)
        finally:
            kill(ranks)
        if any(rank.returncode for rank in ranks):
            why = "a rank failed" if ended else f"the ranks did not end within {timeout:g} s"
            raise AssertionError(f"{target} with {world} ranks: {why}\n" + report(ranks, logs))
        return [json.loads(answer.read_text()) for answer in answers]

    return run


def wait(ranks: list[subprocess.Popen], timeout: float, grace: float = 5) -> bool:
    """Whether all ranks ended, or one failed and the others had ``grace`` seconds to say why, in time."""
    end = time.monotonic() + timeout
    failed = False
    while time.monotonic() < end:
        codes = [rank.poll() for rank in ranks]
        if None not in codes:
            return True
        if any(codes) and not failed:
            failed, end = True, min(end, time.monotonic() + grace)
        time.sleep(0.02)
    return failed


def report(ranks: list[subprocess.Popen], logs: list[Path]) -> str:
    """What each rank printed, and the exit code with which it ended (negative: the signal)."""
    return "\n".join(
        f"--- rank {number}, exit code {rank.returncode}\n{log.read_text(errors='replace')}"
        for number, (rank, log) in enumerate(zip(ranks, logs, strict=True))
    )


def kill(ranks: list[subprocess.Popen]) -> None:
    """End each rank and whatever it started."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
