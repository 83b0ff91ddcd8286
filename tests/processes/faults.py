"""Launches of pretrain.py whose ranks are forks of this process, with a fault planted at a point of the run.

A rank that reaches the point reports so and waits until the caller has done what it wants to do to it. Then it
continues, or enters its fault. So no test has to hit a moment.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import fcntl
import importlib
import os
import re
import runpy
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megamask import pretrain
from megamask.data import prepare
from tests.processes.server import free_port
from tests.system.commands import ROOT, text

TIMEOUT = 600.0
"""Seconds until a launch that does not end counts as one that hangs."""
POINTS = {
    "building": "megamask.engine.engine:Engine.__init__",
    "data": "megamask.data.packs:Packs.batch",
    "forward": "deepspeed.runtime.engine:DeepSpeedEngine.forward",
    "backward": "deepspeed.runtime.engine:DeepSpeedEngine.backward",
    "step": "megamask.engine.engine:Engine.step",
    "stop": "megamask.health.stop_signals:StopRequest.any_rank",
    "evaluation": "megamask.training.validation:validate_sources",
    "publish": "megamask.checkpoint.save:save_checkpoint",
    "save": "megamask.checkpoint.save:_write_share",
    "export": "megamask.training.finish:finish_run",
}
"""The function that is called at each point. "import" is a point too, found in another way."""
ALWAYS = -1
"""A fault each time that its point is reached."""
PLANTED = "planted fault"
"""The message of a planted error."""


@dataclass(frozen=True)
class Fault:
    """What happens on ``rank`` when it reaches a point for the nth time."""

    point: str
    rank: int = 1
    nth: int = 1
    kind: str = "none"
    waits: bool = True
    """Whether the rank first waits for the caller."""


@dataclass(frozen=True)
class Result:
    """How a launch with a fault ended. Lists are by rank."""

    fault: Fault
    codes: list[int | None]
    """Exit codes; None for a rank that hung and was killed by the test."""
    seconds: float
    """From the fault to the end of the last rank that ended by itself."""
    printed: list[str]
    stacks: list[str]
    reason: str = ""
    """The launch's exit code and reason in the run folder."""
    leftovers: list[str] = field(default_factory=list)
    """Processes, files and locks that should be gone."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Result:
        return cls(**record | {"fault": Fault(**record["fault"])})

    @property
    def everything_printed(self) -> str:
        return "\n".join(self.printed)

    @property
    def other_ranks(self) -> list[int]:
        return [rank for rank in range(len(self.codes)) if rank != self.fault.rank]


@dataclass(frozen=True)
class Orphan:
    """What became of a rank whose launcher was killed."""

    launcher: str
    fault: str
    ended: bool
    seconds: float
    steps: list[int]
    """Of the checkpoints."""
    printed: str


@dataclass
class Launch:
    """Ranks that run, or have ended."""

    output: Path
    pids: list[int]
    reached: int
    """A pipe in which a rank reports that it reached its fault."""
    go: int
    """A pipe in which it waits."""
    began: float
    codes: dict[int, int] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)

    def wait_for_fault(self) -> bool:
        """Whether a rank reached its fault; it waits there."""
        while not select.select([self.reached], [], [], 0.05)[0]:
            if self.all_ended() or time.monotonic() - self.began > TIMEOUT:
                return False
        return bool(os.read(self.reached, 1))

    def note_fault(self) -> None:
        """Take the time, if a rank reached its fault."""
        if select.select([self.reached], [], [], 0)[0] and os.read(self.reached, 1):
            self.began = time.monotonic()

    def enter_fault(self) -> None:
        """Let the waiting rank continue into its fault."""
        self.began = time.monotonic()
        os.write(self.go, b"x")

    def all_ended(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank], self.ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        return len(self.codes) == len(self.pids)

    def end(self, timeout: float = TIMEOUT) -> list[int | None]:
        """The exit code of each rank; None for one that hung and was killed."""
        while not self.all_ended() and time.monotonic() - self.began < timeout:
            time.sleep(0.02)
        hung = [rank for rank in range(len(self.pids)) if rank not in self.codes]
        for rank in hung:
            os.kill(self.pids[rank], signal.SIGKILL)
            os.waitpid(self.pids[rank], 0)
        self.note_fault()
        for pipe in (self.reached, self.go):
            os.close(pipe)
        return [None if rank in hung else self.codes[rank] for rank in range(len(self.pids))]

    @property
    def seconds(self) -> float:
        """From the fault to the end of the last rank that ended by itself."""
        return max(self.ended.values(), default=self.began) - self.began

    @property
    def printed(self) -> list[str]:
        """What each rank printed."""
        return [printed_file(self.output, rank).read_text(errors="replace") for rank in range(len(self.pids))]

    def result(self, fault: Fault) -> Result:
        """How the launch ended; ranks that still run are killed."""
        codes, logs = self.end(0), self.output / "logs"
        stacks = ["".join(p.read_text()[512:] for p in logs.glob(f"beat-*-{r:05d}.txt")) for r in range(len(codes))]
        reason = "".join(path.read_text() for path in logs.glob("end-*.txt"))
        return Result(fault, codes, self.seconds, self.printed, stacks, reason, self.leftovers())

    def leftovers(self) -> list[str]:
        """What the launch left that should be gone: processes, temporary files, heartbeats, the lock."""
        left = [str(path) for path in self.output.rglob("*") if re.match(r"\.tmp|\.trash|beat-", path.name)]
        left += [f"process {pid}" for pid in self.pids if Path(f"/proc/{pid}").exists()]
        if not (self.output / "run.lock").exists():  # stopped before there was anything to write
            return left
        with (self.output / "run.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                left.append(f"lock of {lock.read()}")
        shared = os.listdir("/dev/shm")
        return left + [f"/dev/shm/{name}" for name in shared if any(str(pid) in name for pid in self.pids)]


def printed_file(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}-rank-{rank}.txt")


def launch(arguments: list[str], output: Path, fault: Fault | None = None, world: int = 2) -> Launch:
    """Start the ranks of a run; what they print goes into files beside ``output``."""
    port = free_port()
    reached, report = os.pipe()
    wait, go = os.pipe()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            try:
                os.close(reached)
                os.close(go)
                _run_rank(rank, world, port, arguments, output, fault, report, wait)
            finally:
                os._exit(99)
        pids.append(pid)
    os.close(report)
    os.close(wait)
    return Launch(output, pids, reached, go, time.monotonic())


def _run_rank(
    rank: int, world: int, port: int, arguments: list[str], output: Path, fault: Fault | None, report: int, wait: int
) -> None:
    os.dup2(os.open(printed_file(output, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(ROOT)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip

    def reach() -> bool:
        os.write(report, b"x")
        if fault.waits:
            os.read(wait, 1)
        return _suffer(fault.kind, output)

    if fault and rank == fault.rank:
        _plant(fault, reach)
    for name in ("megamask.pretrain", "megamask.training.loop"):
        del sys.modules[name]  # so that it imports what is planted
    sys.argv = ["megamask/pretrain.py", *arguments]
    runpy.run_path("megamask/pretrain.py", run_name="__main__")


def wrap(point: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace the function of a point by what ``wrapper`` makes of it."""
    module, _, path = POINTS[point].partition(":")
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    setattr(owner, name, wrapper(getattr(owner, name)))


def _plant(fault: Fault, reach: Callable[[], bool]) -> None:
    calls = Counter()
    if fault.point == "import":
        real = builtins.__import__

        def planted_import(name, *rest):
            if name == "megamask.training.validation" and not calls["import"]:
                calls["import"] += 1
                reach()
            return real(name, *rest)

        builtins.__import__ = planted_import
        return

    def wrapper(function: Callable) -> Callable:
        def planted(*args, **kwargs):
            calls["all"] += 1
            if fault.nth in (calls["all"], ALWAYS) and reach():
                return None
            return function(*args, **kwargs)

        return planted

    wrap(fault.point, wrapper)


def _suffer(kind: str, output: Path) -> bool:
    """The fault itself; True if the call is to be skipped."""
    if kind == "sleep":
        time.sleep(10 * TIMEOUT)
    if kind == "slow":
        time.sleep(0.5)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "gil":
        ctypes.PyDLL(None).sleep(int(10 * TIMEOUT))  # as a library that does not release the interpreter
    if kind == "fifo":
        fifo = output.with_name(f"{output.name}-fifo")
        os.mkfifo(fifo)
        fifo.open().read()
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "assertion":
        raise AssertionError(PLANTED)
    if kind == "memory":
        raise torch.OutOfMemoryError(PLANTED)
    if kind == "data":
        raise prepare.DataError(f"{PLANTED}.")
    return kind == "skip"


def make_data(folder: Path) -> Path:
    """Shards of a small text, made in a process of its own."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            (folder / "corpus.txt").write_text(text(documents=60))
            kinds = {"tokenizer": "wordpiece", "vocab_size": 300, "valid_share": 0.2, "workers": 1}
            prepare.prepare(prepare.PrepareConfig((str(folder / "corpus.txt"),), folder / "data", **kinds))
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    return folder / "data"


assert pretrain  # imported once, before the forks
