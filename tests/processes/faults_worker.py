"""Launches of pretrain.py whose ranks are forks of this process, with a fault planted at a point of the run.

A rank that comes to the point tells so and waits until the caller has done what it wants to do to it; then it goes on,
or into its fault. So no test has to hit a moment.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import fcntl
import hashlib
import importlib
import os
import random
import re
import runpy
import select
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megamask import pretrain
from megamask.checkpoint.format import RunFolder
from megamask.data import prepare
from megamask.engine import engine
from megamask.errors import REQUEUE
from megamask.health import watchdog
from megamask.health.stop_signals import StopRequest
from tests.processes.server import free_port
from tests.system.commands import ROOT, text, training

PATIENCE = 600.0
"""Seconds until a launch that does not end counts as one that hangs."""
POINTS = {
    "building": "megamask.engine.engine:Engine.__init__",
    "data": "megamask.data.packs:Packs.batch",
    "forward": "deepspeed.runtime.engine:DeepSpeedEngine.forward",
    "backward": "deepspeed.runtime.engine:DeepSpeedEngine.backward",
    "step": "megamask.engine.engine:Engine.step",
    "stop": "megamask.health.stop_signals:StopRequest.any_rank",
    "evaluation": "megamask.training.validation:validate",
    "publish": "megamask.checkpoint.save:save_checkpoint",
    "save": "megamask.checkpoint.save:_write_share",
    "export": "megamask.training.summary:finish_run",
}
"""What is called at each point; the import is found in another way."""
ANY = -1
"""A fault each time that its point is come to."""


@dataclass(frozen=True)
class Fault:
    """What happens on ``rank`` when it comes to a point for the nth time."""

    point: str
    rank: int = 1
    nth: int = 1
    kind: str = "none"
    waits: bool = True
    """Whether it comes only when the caller says so."""


@dataclass
class Launch:
    """Ranks under way, or ended."""

    output: Path
    pids: list[int]
    reached: int
    go: int
    began: float
    codes: dict[int, int] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)

    def wait_for_fault(self) -> bool:
        """Whether a rank came to its fault; it waits there."""
        while not select.select([self.reached], [], [], 0.05)[0]:
            if self._poll() or time.monotonic() - self.began > PATIENCE:
                return False
        return bool(os.read(self.reached, 1))

    def reached_fault(self) -> None:
        """Take the time, if a rank came to its fault."""
        if select.select([self.reached], [], [], 0)[0] and os.read(self.reached, 1):
            self.began = time.monotonic()

    def let_go(self) -> None:
        """Let it go into its fault."""
        self.began = time.monotonic()
        os.write(self.go, b"x")

    def _poll(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank], self.ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        return len(self.codes) == len(self.pids)

    def end(self, patience: float = PATIENCE) -> list[int | None]:
        """How each rank ended; None for one that hung and was killed."""
        while not self._poll() and time.monotonic() - self.began < patience:
            time.sleep(0.02)
        hung = [rank for rank in range(len(self.pids)) if rank not in self.codes]
        for rank in hung:
            os.kill(self.pids[rank], signal.SIGKILL)
            os.waitpid(self.pids[rank], 0)
        self.reached_fault()
        for end in (self.reached, self.go):
            os.close(end)
        return [None if rank in hung else self.codes[rank] for rank in range(len(self.pids))]

    @property
    def seconds(self) -> float:
        """From the fault to the end of the last rank that ended by itself."""
        return max(self.ended.values(), default=self.began) - self.began

    def said(self, rank: int) -> str:
        """What a rank printed."""
        return _said(self.output, rank).read_text(errors="replace")


def _said(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}-rank-{rank}.txt")


def launch(arguments: list[str], output: Path, fault: Fault | None = None, world: int = 2) -> Launch:
    """Start the ranks of a run; what they print goes into files beside ``output``."""
    port = free_port()
    reached, reaching = os.pipe()
    going, go = os.pipe()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            try:
                os.close(reached)
                os.close(go)
                _be(rank, world, port, arguments, output, fault, reaching, going)
            finally:
                os._exit(99)
        pids.append(pid)
    os.close(reaching)
    os.close(going)
    return Launch(output, pids, reached, go, time.monotonic())


def _be(rank, world, port, arguments, output, fault, reaching, going) -> None:
    os.dup2(os.open(_said(output, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(ROOT)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip

    def meet() -> bool:
        os.write(reaching, b"x")
        if fault.waits:
            os.read(going, 1)
        return _suffer(fault.kind, output)

    if fault and rank == fault.rank:
        _plant(fault, meet)
    sys.argv = ["megamask/pretrain.py", *arguments]
    runpy.run_path("megamask/pretrain.py", run_name="__main__")


def _plant(fault: Fault, meet) -> None:
    calls = Counter()
    if fault.point == "import":
        real = builtins.__import__

        def imports(name, *rest):
            if name == "megamask.training.validation" and not calls["import"]:
                calls["import"] += 1
                meet()
            return real(name, *rest)

        builtins.__import__ = imports
        return
    module, _, path = POINTS[fault.point].partition(":")
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    whole = getattr(owner, name)

    def planted(*given, **named):
        calls[name] += 1
        if fault.nth in (calls[name], ANY) and meet():
            return None
        return whole(*given, **named)

    setattr(owner, name, planted)


def _suffer(kind: str, output: Path) -> bool:
    """The fault itself; True if the call is to be left out."""
    if kind == "sleep":
        time.sleep(10 * PATIENCE)
    if kind == "slow":
        time.sleep(0.5)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "gil":
        ctypes.PyDLL(None).sleep(int(10 * PATIENCE))  # as a library does that does not let go of the interpreter
    if kind == "fifo":
        fifo = output.with_name(f"{output.name}-fifo")
        os.mkfifo(fifo)
        fifo.open().read()
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "assertion":
        raise AssertionError("what was planted")
    if kind == "memory":
        raise torch.OutOfMemoryError("what was planted")
    if kind == "data":
        raise prepare.DataError("what was planted.")
    return kind == "skip"


# ---- what tests call


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


# under nohup a hang-up asks for nothing
HANGS_UP = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, *HANGS_UP)
PHASES = ("import", "building", "data", "forward", "backward", "step", "stop", "evaluation", "save")


def signals(folder: str, count: int, seed: int) -> dict:
    """One run that is asked to stop ``count`` times, each time at another point, and gone on with; and one that is not.

    The first of the points are all there are, the others random; so are signals, numbers of them, and who gets them.
    """
    home, draw = Path(folder), random.Random(seed)
    data = make_data(home)
    steps = 2 * count + 4
    every = {"steps": steps, "checkpoint__every": 2, "validation__every": 3}
    straight, stopped = home / "straight", home / "stopped"
    reference = launch(training(data, straight, **every), straight)
    assert reference.end() == [0, 0], reference.said(0) + reference.said(1)
    found = {"codes": Counter(), "seconds": [], "points": Counter(), "second saves": 0, "leftovers": []}
    points = [*draw.sample(PHASES, min(count, len(PHASES))), *draw.choices(PHASES, k=max(0, count - len(PHASES)))]
    for point in points:
        before = max(RunFolder(stopped).steps(), default=0)
        at = draw.randint(0, 1)
        run = launch(training(data, stopped, **every), stopped, Fault(point, at))
        assert run.wait_for_fault(), f"{point}: {run.end(0)} {run.said(0)} {run.said(1)}"
        # the other may not have come to its first line yet, before which a signal ends it
        who = [at] if point == "import" else draw.choice([[0], [1], [0, 1]])
        which = draw.choice(SIGNALS)
        for _ in range(draw.randint(1, 2)):
            for rank in who:
                os.kill(run.pids[rank], which)
        run.let_go()
        codes = run.end()
        found["codes"][str(codes)] += 1
        found["points"][point] += 1
        found["seconds"].append(run.seconds)
        assert codes == [REQUEUE, REQUEUE], f"{point}, {which.name} to {who}: {codes} {run.said(0)} {run.said(1)}"
        after = max(RunFolder(stopped).steps(), default=0)
        found["second saves"] += point == "save" and after != before + 2 - before % 2
        found["leftovers"] += leftovers(stopped, run)
    for point in ("save", "export"):  # of the last step, and after it: the end comes as usual
        left = steps - max(RunFolder(stopped).steps())
        saves = len([s for s in range(steps - left + 1, steps + 1) if s % 2 == 0 or s == steps])
        run = launch(training(data, stopped, **every), stopped, Fault(point, 0, nth=max(saves, 1)))
        assert run.wait_for_fault(), f"{point}: {run.end(0)} {run.said(0)}"
        for pid in run.pids:
            os.kill(pid, signal.SIGTERM)
        run.let_go()
        found["codes"][f"{point} at the end: {run.end()}"] += 1
        found["leftovers"] += leftovers(stopped, run)
    found["same"] = _weights(stopped, steps) == _weights(straight, steps)
    return found


def _weights(run: Path, step: int) -> dict[str, str]:
    files = sorted(RunFolder(run).checkpoint(step).glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def leftovers(output: Path, run: Launch) -> list[str]:
    """What a launch left that should be gone: processes, temporary files, beats, the lock's holder."""
    left = [str(path) for path in output.rglob("*") if re.match(r"\.tmp|\.trash|beat-", path.name)]
    left += [f"process {pid}" for pid in run.pids if Path(f"/proc/{pid}").exists()]
    if not output.exists():  # asked to stop before there was anything to write
        return left
    with (output / "run.lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            left.append(f"lock of {lock.read()}")
    return left + [f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if any(str(pid) in name for pid in run.pids)]


def wait_for_all(runs: list[Launch], grace: float = 10.0) -> None:
    """Until all ranks of all launches have ended, or for a while after but one of each has."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and not all([run._poll() for run in runs]):
        for run in runs:
            run.reached_fault()
        if all(len(run.codes) >= len(run.pids) - 1 for run in runs):
            until, grace = min(until, time.monotonic() + grace), PATIENCE
        time.sleep(0.02)


def hanging(folder: str, faults: list[list], timeout: float, longest: float = 100.0) -> list[dict]:
    """What became of launches of which each hangs in its way, all at once."""
    home = Path(folder)
    data = make_data(home)
    runs = []
    for number, (point, rank, nth, kind) in enumerate(faults):
        output = home / f"run-{number}"
        world = 3 if kind == "skip" else 2  # of two that wait for different things, either may be wrong
        limits = {"watchdog__timeout": timeout, "watchdog__rare_timeout": longest, "packs__per_step": world}
        arguments = training(data, output, steps=6, checkpoint__every=2, validation__every=100, **limits)
        runs.append((launch(arguments, output, Fault(point, rank, nth, kind, waits=False), world), rank, kind))
    wait_for_all([run for run, *_ in runs])
    told = []
    for run, rank, kind in runs:
        codes = run.end(0)
        logs = run.output / "logs"
        stacks = {
            r: "\n".join(p.read_text()[512:] for p in logs.glob(f"beat-*-{r:05d}.txt")) for r in range(len(codes))
        }
        told.append({
            "fault": kind, "rank": rank, "codes": codes, "seconds": run.seconds, "stacks": stacks,
            "said": [run.said(r) for r in range(len(codes))],
            "word": "".join(path.read_text() for path in logs.glob("end-*.txt")),
        })  # fmt: skip
    return told


def without_a_timer(folder: str, timeout: float) -> list[dict]:
    """A rank that holds the interpreter under a watchdog that is a thread of Python and no more."""
    watchdog.faulthandler.dump_traceback_later = lambda *rest, **more: None
    return hanging(folder, [["backward", 1, 2, "gil"]], timeout)


def failures(folder: str, hung: list[list], failed: list[list], timeout: float) -> dict:
    """Both, for imports take as long as both."""
    (Path(folder) / "hung").mkdir()
    (Path(folder) / "failed").mkdir()
    return {
        "hung": hanging(f"{folder}/hung", hung, timeout), "failed": failing(f"{folder}/failed", failed),
        "orphans": orphans(folder),
    }  # fmt: skip


def calm(folder: str, timeout: float, seconds: float) -> dict:
    """A run in which what comes seldom takes ``seconds``, longer than a step may, and the clock of the day jumps."""
    home = Path(folder)
    data = make_data(home)
    output = home / "run"
    limits = {"watchdog__timeout": timeout, "watchdog__rare_timeout": 100.0}
    for point in ("building", "step", "evaluation", "save", "export"):
        module, _, path = POINTS[point].partition(":")
        owner = importlib.import_module(module)
        for part in path.split(".")[:-1]:
            owner = getattr(owner, part)
        setattr(owner, path.split(".")[-1], _slow(getattr(owner, path.split(".")[-1]), seconds, once=point == "step"))
    now, began = time.time, time.monotonic()
    time.time = lambda: now() + 3600 * int(time.monotonic() - began)
    run = launch(training(data, output, steps=3, checkpoint__every=2, validation__every=2, **limits), output)
    return {"codes": run.end(), "said": [run.said(0), run.said(1)]}


def _slow(whole, seconds: float, once: bool):
    calls = Counter()

    def slow(*given, **named):
        calls["all"] += 1
        if not once or calls["all"] == 1:
            time.sleep(seconds)
        return whole(*given, **named)

    return slow


def slow_ranks(folder: str, whole_steps: bool) -> list[str]:
    """What the ranks of a run say of which one is slow; with ``whole_steps``, if each took its whole time for its own.

    Each forward pass of the slow one lasts half a second longer.
    """
    home = Path(folder)
    data, output = make_data(home), home / "run"
    if whole_steps:
        began = time.monotonic()
        engine.Engine.forward_seconds = lambda self: time.monotonic() - began
    slow = Fault("forward", rank=1, nth=ANY, kind="slow", waits=False)
    run = launch(training(data, output, steps=5, validation__every=100), output, slow)
    assert run.end() == [0, 0], run.said(0)
    return [run.said(0), run.said(1)]


def enduring(folder: str, seconds: float, hangs_after: float) -> dict:
    """A run of two ranks that trains, evaluates and saves all the time, and what it holds meanwhile.

    After ``seconds`` it is asked to stop. Of each rank the bytes of memory and the number of open files, every second.
    """
    home = Path(folder)
    data, output = make_data(home), home / "run"
    limits = {"watchdog__timeout": hangs_after, "watchdog__rare_timeout": 2 * hangs_after}
    often = {"checkpoint__every": 50, "validation__every": 70, "log__every": 10, "steps": 10**8}
    run = launch(training(data, output, **often, **limits), output)
    held: list[list[tuple[int, int]]] = [[], []]
    while time.monotonic() - run.began < seconds and not run._poll():
        for rank, pid in enumerate(run.pids):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            held[rank].append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))))
        time.sleep(1)
    os.kill(run.pids[1], signal.SIGTERM)
    codes = run.end(time.monotonic() - run.began + PATIENCE)
    return {"codes": codes, "held": held, "step": max(RunFolder(output).steps()), "said": run.said(0)[-2000:]}


def failing(folder: str, faults: list[list]) -> list[dict]:
    """What became of launches of which one rank fails, or is killed, all at once."""
    home = Path(folder)
    data = make_data(home)
    runs = []
    for number, (point, rank, nth, kind) in enumerate(faults):
        output = home / f"run-{number}"
        arguments = training(data, output, steps=6, checkpoint__every=2, validation__every=2)
        runs.append(launch(arguments, output, Fault(point, rank, nth, kind, waits=False)))
    wait_for_all(runs)
    told = []
    for run, fault in zip(runs, faults, strict=True):
        codes = run.end(0)
        left = leftovers(run.output, run) if fault[3] != "killed" and run.output.exists() else []
        told.append({"fault": fault, "codes": codes, "seconds": run.seconds, "said": [run.said(0), run.said(1)],
                     "leftovers": left})  # fmt: skip
    return told


LAUNCHERS = {"torchrun": {"TORCHELASTIC_RUN_ID": "none"}, "deepspeed": {"CROSS_RANK": "0", "LOCAL_SIZE": "1"}}


def orphans(
    folder: str, kinds: tuple = (("torchrun", "none"), ("deepspeed", "sleep"), ("shell", "none"))
) -> list[dict]:
    """What ranks do whose parent is killed in their midst, by what it tells them that it is, and by their fault."""
    home = Path(folder)
    data = RunFolder(home).path / "data"
    data = data if data.exists() else make_data(home)
    told, under_way = [], []
    for number, (launcher, kind) in enumerate(kinds):
        output = home / f"orphan-{number}"
        telling, tell = os.pipe()
        going, go = os.pipe()
        parent = os.fork()
        if not parent:
            os.environ |= LAUNCHERS.get(launcher, {})
            arguments = training(data, output, steps=40, checkpoint__every=100, validation__every=100)
            run = launch(arguments, output, Fault("backward", 0, 3, kind), world=1)
            run.wait_for_fault()
            os.write(tell, str(run.pids[0]).encode())
            os.read(going, 1)  # until the kill
            os._exit(1)
        os.close(tell)
        orphan = int(os.read(telling, 20))
        under_way.append((launcher, kind, output, orphan, os.pidfd_open(orphan), time.monotonic()))
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.close(go)
    for launcher, kind, output, orphan, handle, began in under_way:
        ended = bool(select.select([handle], [], [], PATIENCE)[0])
        if not ended:
            os.kill(orphan, signal.SIGKILL)
        told.append({
            "launcher": launcher, "fault": kind, "ended": ended, "seconds": time.monotonic() - began,
            "steps": RunFolder(output).steps(), "said": _said(output, 0).read_text(),
        })  # fmt: skip
    return told


def disagreeing(folder: str) -> list[int | None]:
    """The exit codes of ranks of which each asks only itself whether to stop."""
    home = Path(folder)
    data, output = make_data(home), home / "run"
    StopRequest.any_rank = StopRequest.this_rank
    limits = {"watchdog__timeout": 4.0, "watchdog__rare_timeout": 8.0}
    run = launch(training(data, output, steps=8, checkpoint__every=2, **limits), output, Fault("backward", 1, 2))
    assert run.wait_for_fault()
    os.kill(run.pids[1], signal.SIGTERM)
    run.let_go()
    return run.end()


assert pretrain  # imported once, before the forks
