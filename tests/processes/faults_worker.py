"""What tests of faults run in a process of its own: launches with faults (see ``faults``), whose results are JSON."""

from __future__ import annotations

import hashlib
import os
import random
import select
import signal
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from megamask.checkpoint.run_folder import RunFolder
from megamask.engine import engine
from megamask.errors import REQUEUE
from megamask.health import watchdog
from megamask.health.stop_signals import StopRequest
from tests.processes.faults import (
    ALWAYS,
    TIMEOUT,
    Fault,
    Launch,
    Orphan,
    launch,
    make_data,
    printed_file,
    wrap,
)
from tests.system.commands import training

# under nohup a hang-up requests nothing
HANGS_UP = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, *HANGS_UP)
PHASES = ("import", "building", "data", "forward", "backward", "step", "stop", "evaluation", "save")


def hanging(folder: str, faults: list[dict], timeout: float, rare_timeout: float = 100.0) -> list[dict]:
    """The results of launches that hang, all at once, under a watchdog with these limits."""
    limits = {"watchdog__timeout": timeout, "watchdog__rare_timeout": rare_timeout, "validation__every": 100}
    return _results(Path(folder), [Fault(**fault) for fault in faults], limits)


def failing(folder: str, faults: list[dict]) -> list[dict]:
    """The results of launches of which one rank fails or is killed, all at once."""
    return _results(Path(folder), [Fault(**fault) for fault in faults], {"validation__every": 2})


def _results(home: Path, faults: list[Fault], settings: dict[str, float]) -> list[dict]:
    home.mkdir(exist_ok=True)
    data = make_data(home)
    runs = []
    for number, fault in enumerate(faults):
        output = home / f"run-{number}"
        world = 3 if fault.kind == "skip" else 2  # of two ranks in different collectives, neither can be blamed
        arguments = training(data, output, steps=6, checkpoint__every=2, packs__per_step=world, **settings)
        runs.append(launch(arguments, output, fault, world))
    _wait_for_all(runs)
    return [asdict(run.result(fault)) for run, fault in zip(runs, faults, strict=True)]


def _wait_for_all(runs: list[Launch], grace: float = 10.0) -> None:
    """Wait until all ranks of all launches have ended, or some seconds after all but one of each have."""
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until and not all([run.all_ended() for run in runs]):
        for run in runs:
            run.note_fault()
        if all(len(run.codes) >= len(run.pids) - 1 for run in runs):
            until, grace = min(until, time.monotonic() + grace), TIMEOUT
        time.sleep(0.02)


def without_a_timer(folder: str, fault: dict, timeout: float) -> list[dict]:
    """The result of a hang under a watchdog that is only a thread of Python."""
    watchdog.faulthandler.dump_traceback_later = lambda *_, **__: None
    return hanging(folder, [fault], timeout)


def all_faults(folder: str, hung: list[dict], failed: list[dict], timeout: float) -> dict:
    """Hangs, failures and orphans in one process, because imports take as long as all of them."""
    return {
        "hung": hanging(f"{folder}/hung", hung, timeout),
        "failed": failing(f"{folder}/failed", failed),
        "orphans": orphans(folder),
    }


LAUNCHERS = {"torchrun": {"TORCHELASTIC_RUN_ID": "none"}, "deepspeed": {"CROSS_RANK": "0", "LOCAL_SIZE": "1"}}


def orphans(folder: str) -> list[dict]:
    """The results of single ranks whose parent is killed, by the launcher that the environment names."""
    home = Path(folder)
    data, running = make_data(home), []
    for launcher, kind in (("torchrun", "none"), ("deepspeed", "sleep"), ("shell", "none")):
        output = home / f"orphan-{launcher}"
        reading, tell = os.pipe()
        wait, go = os.pipe()
        parent = os.fork()
        if not parent:
            os.environ |= LAUNCHERS.get(launcher, {})
            arguments = training(data, output, steps=40, checkpoint__every=100, validation__every=100)
            run = launch(arguments, output, Fault("backward", 0, 3, kind), world=1)
            run.wait_for_fault()
            os.write(tell, str(run.pids[0]).encode())
            os.read(wait, 1)  # until the kill
            os._exit(1)
        os.close(tell)
        orphan = int(os.read(reading, 20))
        running.append((launcher, kind, output, orphan, os.pidfd_open(orphan), time.monotonic()))
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.close(go)
    results = []
    for launcher, kind, output, orphan, handle, began in running:
        ended = bool(select.select([handle], [], [], TIMEOUT)[0])
        if not ended:
            os.kill(orphan, signal.SIGKILL)
        steps, printed = RunFolder(output).steps(), printed_file(output, 0).read_text()
        results.append(asdict(Orphan(launcher, kind, ended, time.monotonic() - began, steps, printed)))
    return results


def slow_phases(folder: str, timeout: float, seconds: float) -> dict:
    """A run in which rare phases take ``seconds``, longer than a step may, and the clock of the day jumps."""
    home = Path(folder)
    data, output, steps = make_data(home), home / "run", Counter()
    for point in ("building", "step", "evaluation", "save", "export"):

        def slow(function, point=point):
            def sleep_first(*args, **kwargs):
                steps[point] += 1
                if point != "step" or steps[point] == 1:
                    time.sleep(seconds)
                return function(*args, **kwargs)

            return sleep_first

        wrap(point, slow)
    now, began = time.time, time.monotonic()
    time.time = lambda: now() + 3600 * int(time.monotonic() - began)
    limits = {"watchdog__timeout": timeout, "watchdog__rare_timeout": 100.0}
    run = launch(training(data, output, steps=3, checkpoint__every=2, validation__every=2, **limits), output)
    return {"codes": run.end(), "printed": run.printed}


def slow_ranks(folder: str, whole_steps: bool) -> list[str]:
    """What each rank prints when each forward pass of rank 1 takes half a second longer.

    With ``whole_steps``, each rank reports the time of its whole steps as that of its own work.
    """
    home = Path(folder)
    data, output = make_data(home), home / "run"
    if whole_steps:
        began = time.monotonic()
        engine.Engine.forward_seconds = lambda self: time.monotonic() - began
    slow = Fault("forward", rank=1, nth=ALWAYS, kind="slow", waits=False)
    run = launch(training(data, output, steps=5, validation__every=100), output, slow)
    assert run.end() == [0, 0], run.printed
    return run.printed


def signals(folder: str, count: int, seed: int, points_first: list[str] | None = None, **more: object) -> dict:
    """A run that is signalled ``count`` times, each time at another point, and resumed; compared with one that is not.

    The first points are ``points_first``, else all that there are, the others random; so are the signals, their number,
    and the ranks. ``more`` are settings of the signalled run.
    """
    home, draw = Path(folder), random.Random(seed)
    data = make_data(home)
    steps = 2 * count + 4
    every = {"steps": steps, "checkpoint__every": 2, "validation__every": 3}
    straight, stopped = home / "straight", home / "stopped"
    reference = launch(training(data, straight, **every), straight)
    assert reference.end() == [0, 0], reference.printed
    codes, points, seconds, second_saves, lost_saves, leftovers = Counter(), Counter(), [], 0, 0, []
    first = points_first or draw.sample(PHASES, min(count, len(PHASES)))
    order = [*first, *draw.choices(PHASES, k=max(0, count - len(first)))]
    for point in order:
        before = max(RunFolder(stopped).steps(), default=0)
        rank = draw.randint(0, 1)
        run = launch(training(data, stopped, **every, **more), stopped, Fault(point, rank))
        assert run.wait_for_fault(), f"{point}: {run.end(0)} {run.printed}"
        # the other may not have reached its first line yet, before which a signal ends it
        targets = [rank] if point == "import" else draw.choice([[0], [1], [0, 1]])
        which = draw.choice(SIGNALS)
        for _ in range(draw.randint(1, 2)):
            for target in targets:
                os.kill(run.pids[target], which)
        run.enter_fault()
        ended = run.end()
        codes[str(ended)] += 1
        points[point] += 1
        seconds.append(run.seconds)
        assert ended == [REQUEUE, REQUEUE], f"{point}, {which.name} to {targets}: {ended} {run.printed}"
        if point == "save":
            saves, interrupted = RunFolder(stopped).steps(), before + 2 - before % 2
            second_saves += max(saves) != interrupted
            lost_saves += interrupted not in saves
        leftovers += run.leftovers()
    for point in ("save", "export"):  # of the last step, and after it: the run ends as usual
        left = steps - max(RunFolder(stopped).steps())
        saves = len([s for s in range(steps - left + 1, steps + 1) if s % 2 == 0 or s == steps])
        run = launch(training(data, stopped, **every, **more), stopped, Fault(point, 0, nth=max(saves, 1)))
        assert run.wait_for_fault(), f"{point}: {run.end(0)} {run.printed}"
        for pid in run.pids:
            os.kill(pid, signal.SIGTERM)
        run.enter_fault()
        codes[f"{point} at the end: {run.end()}"] += 1
        leftovers += run.leftovers()
    return {
        "codes": codes, "points": points, "seconds": seconds, "second saves": second_saves, "lost saves": lost_saves,
        "leftovers": leftovers,
        "same": _weights(stopped, steps) == _weights(straight, steps),
    }  # fmt: skip


def _weights(run: Path, step: int) -> dict[str, str]:
    files = sorted(RunFolder(run).checkpoint(step).glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def enduring(folder: str, seconds: float, timeout: float) -> dict:
    """A run of two ranks that trains, evaluates and saves for ``seconds``; then it is signalled to stop.

    Of each rank the bytes of memory and the number of open files, every second.
    """
    home = Path(folder)
    data, output = make_data(home), home / "run"
    limits = {"watchdog__timeout": timeout, "watchdog__rare_timeout": 2 * timeout}
    often = {"checkpoint__every": 50, "validation__every": 70, "log__every": 10, "steps": 10**8}
    run = launch(training(data, output, **often, **limits), output)
    usage: list[list[tuple[int, int]]] = [[], []]
    while time.monotonic() - run.began < seconds and not run.all_ended():
        for rank, pid in enumerate(run.pids):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            usage[rank].append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))))
        time.sleep(1)
    os.kill(run.pids[1], signal.SIGTERM)
    codes = run.end(time.monotonic() - run.began + TIMEOUT)
    return {"codes": codes, "usage": usage, "step": max(RunFolder(output).steps()), "printed": run.printed[0][-2000:]}


def disagreeing(folder: str) -> list[int | None]:
    """The exit codes of ranks of which each only asks itself whether to stop."""
    home = Path(folder)
    data, output = make_data(home), home / "run"
    StopRequest.any_rank = StopRequest.this_rank
    limits = {"watchdog__timeout": 4.0, "watchdog__rare_timeout": 8.0}
    run = launch(training(data, output, steps=8, checkpoint__every=2, **limits), output, Fault("backward", 1, 2))
    assert run.wait_for_fault()
    os.kill(run.pids[1], signal.SIGTERM)
    run.enter_fault()
    return run.end()
